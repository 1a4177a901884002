//! A relay's files.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use mesh_api::admin::IssueRelayResponse;

use crate::{failure::Failure, report::RelayFiles};

const CERTIFICATE: &str = "relay.pem";
const KEY: &str = "relay.key";
const CA: &str = "ca.pem";

/// Makes the folder, and refuses one that holds any of the files: a key is not overwritten.
pub(crate) fn prepare(folder: &Path) -> Result<(), Failure> {
    fs::create_dir_all(folder).map_err(|error| Failure::writing(folder, &error))?;
    for name in [CERTIFICATE, KEY, CA] {
        let path = folder.join(name);
        if path.symlink_metadata().is_ok() {
            let there = io::ErrorKind::AlreadyExists.into();
            return Err(Failure::writing(&path, &there));
        }
    }
    Ok(())
}

/// Writes all three files, or none.
pub(crate) fn write(folder: &Path, relay: &IssueRelayResponse) -> Result<RelayFiles, Failure> {
    let mut written: Vec<PathBuf> = Vec::new();
    for (name, text, mode) in [
        (KEY, &relay.key_pem, 0o600),
        (CERTIFICATE, &relay.certificate_pem, 0o644),
        (CA, &relay.ca_pem, 0o644),
    ] {
        let path = folder.join(name);
        if let Err(error) = write_new(&path, text, mode) {
            for path in written {
                fs::remove_file(path).ok(); // What cannot be removed stays and is refused next time.
            }
            return Err(Failure::writing(&path, &error));
        }
        written.push(path);
    }
    let path = |name| folder.join(name).display().to_string();
    Ok(RelayFiles {
        certificate: path(CERTIFICATE),
        key: path(KEY),
        ca: path(CA),
    })
}

fn write_new(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(path)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all());
    if written.is_err() {
        fs::remove_file(path).ok(); // Half a file is worse than none.
    }
    written
}
