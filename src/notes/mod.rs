//! The notes page.
