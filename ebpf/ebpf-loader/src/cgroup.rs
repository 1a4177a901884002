//! Where cgroup2 is, and whether a path is in it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rustix::fs::fstatfs;

const MOUNTS: &str = "/proc/mounts";

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// Why there is no cgroup to attach to.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The mount table cannot be read.
    #[error("cannot read {MOUNTS}")]
    Mounts(#[source] io::Error),
    /// No mount of cgroup2, as under `ip netns exec`.
    #[error(
        "no cgroup2 in {MOUNTS}: mount it (mount -t cgroup2 none /sys/fs/cgroup), and enter \
         network namespaces by `nsenter --net=`, since `ip netns exec` hides it"
    )]
    NotMounted,
    /// The path cannot be opened.
    #[error("cannot open the cgroup {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path is in another file system, a cgroup v1 hierarchy for one.
    #[error("{} is not a cgroup of version 2: cgroup2 mounts are listed in {MOUNTS}", .0.display())]
    NotCgroup2(PathBuf),
}

/// The first cgroup2 mount: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1.
///
/// # Errors
///
/// [`CgroupError::NotMounted`] if there is none.
pub fn find_cgroup2() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string(MOUNTS).map_err(CgroupError::Mounts)?;
    cgroup2_mount(&mounts).ok_or(CgroupError::NotMounted)
}

pub(crate) fn open_cgroup2(path: &Path) -> Result<File, CgroupError> {
    let open_error = |source| CgroupError::Open {
        path: path.to_owned(),
        source,
    };
    let folder = File::open(path).map_err(open_error)?;
    let filesystem = fstatfs(&folder).map_err(|errno| open_error(errno.into()))?;
    if u64::try_from(filesystem.f_type) == Ok(CGROUP2_MAGIC) {
        Ok(folder)
    } else {
        Err(CgroupError::NotCgroup2(path.to_owned()))
    }
}

/// proc_mounts(5): device, mount point, type; a space in a path is written `\040`.
fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    let fields = mounts.lines().map(|line| line.split(' '));
    let mut points = fields.filter_map(|mut fields| {
        let point = fields.nth(1)?;
        (fields.next() == Some("cgroup2")).then_some(point)
    });
    points
        .next()
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_beside_version_1() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      none /srv/cgroup2 tmpfs rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/uni\\040fied cgroup2 rw,relatime 0 0\n";
        assert_eq!(
            cgroup2_mount(mounts),
            Some("/sys/fs/cgroup/uni fied".into())
        );
        assert_eq!(cgroup2_mount("cgroup2\n\nx y\n"), None);
    }

    #[test]
    fn another_file_system_is_told_apart_from_a_missing_path() {
        let other = open_cgroup2(Path::new("/proc"));
        assert!(
            matches!(other, Err(CgroupError::NotCgroup2(_))),
            "{other:?}"
        );
        let missing = open_cgroup2(Path::new("/nonexistent-cgroup"));
        assert!(
            matches!(missing, Err(CgroupError::Open { .. })),
            "{missing:?}"
        );
    }
}
