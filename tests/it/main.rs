//! One integration binary, a module by capability.
