//! Permissions of temporary files.

use tempfile::Builder;

/// Sets the permissions. On Windows the folder of temporary files belongs to the user alone.
#[cfg(unix)]
pub(super) fn set_mode(builder: &mut Builder<'_, '_>, mode: u32) {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    builder.permissions(Permissions::from_mode(mode));
}

#[cfg(windows)]
pub(super) fn set_mode(_: &mut Builder<'_, '_>, _: u32) {}
