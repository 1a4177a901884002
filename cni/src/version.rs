//! The versions of the specification that are answered.

use serde_json::{Value, json};

use crate::error::{CniError, Code};

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1: results with interfaces.
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: addresses no longer say their family.
    V1_0_0,
    /// 1.1.0: GC and STATUS.
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// In which errors are written when the runtime's version is not known.
    pub const LATEST: Self = Self::V1_1_0;

    /// As configurations have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Reads a configuration's `cniVersion`.
    ///
    /// # Errors
    ///
    /// [`Code::IncompatibleVersion`] for all others.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let found = Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text);
        found.ok_or_else(|| {
            let message = format!("cniVersion {text:?} is not supported");
            CniError::new(Code::IncompatibleVersion, message)
                .with(format!("use one of {}", names().join(", ")))
        })
    }

    /// The answer to VERSION, which echoes what the runtime `asked` in.
    #[must_use]
    pub fn answer(asked: &str) -> Value {
        json!({"cniVersion": asked, "supportedVersions": names()})
    }
}

fn names() -> [&'static str; 4] {
    Version::ALL.map(Version::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_versions_are_read_and_no_other() {
        for version in Version::ALL {
            assert_eq!(Version::parse(version.as_str()), Ok(version));
        }
        for other in ["", "0.1.0", "0.3.0", "1.0", "1.2.0", "v1.1.0", "1.1.0 "] {
            let error = Version::parse(other).unwrap_err();
            assert_eq!(error.code, Code::IncompatibleVersion, "{other}");
            assert!(error.details.contains("1.1.0"), "{error}");
        }
    }

    #[test]
    fn the_answer_to_version_lists_all_and_echoes() {
        assert_eq!(
            Version::answer("1.0.0"),
            json!({"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]})
        );
    }
}
