//! Errors as the specification has them: a code for the runtime, and words for who reads its log.

use std::fmt;

use serde_json::{Value, json};

use crate::version::Version;

/// What a runtime can do about an error. Up to 99 the specification says what a number means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Code {
    /// The version of the configuration, or what was asked in that version, is not supported.
    IncompatibleVersion = 1,
    /// The configuration has a field that is not supported.
    UnsupportedField = 2,
    /// There is no such container: nothing is to be cleaned up.
    UnknownContainer = 3,
    /// An environment variable is missing or wrong.
    BadEnvironment = 4,
    /// A file cannot be read or written.
    Io = 5,
    /// The input is no configuration at all.
    Decode = 6,
    /// The configuration has a wrong value.
    BadConfig = 7,
    /// It will work later by itself.
    TryAgain = 11,
    /// ADD cannot work.
    Unavailable = 50,
    /// ADD cannot work, and pods that are connected may be cut off.
    Limited = 51,
    /// Every address of the range is taken.
    Exhausted = 100,
    /// CHECK: something is not as ADD left it.
    Differs = 101,
    /// The kernel refused.
    Kernel = 102,
}

impl Code {
    /// All of them, in order.
    pub const ALL: [Self; 13] = [
        Self::IncompatibleVersion,
        Self::UnsupportedField,
        Self::UnknownContainer,
        Self::BadEnvironment,
        Self::Io,
        Self::Decode,
        Self::BadConfig,
        Self::TryAgain,
        Self::Unavailable,
        Self::Limited,
        Self::Exhausted,
        Self::Differs,
        Self::Kernel,
    ];
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// What the runtime can do.
    pub code: Code,
    /// What was attempted, and which input was wrong.
    pub message: String,
    /// The cause, or what to do. May be empty.
    pub details: String,
}

impl CniError {
    /// An error with a message alone.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// Adds the cause, or what to do.
    #[must_use]
    pub fn with(mut self, details: impl fmt::Display) -> Self {
        if !self.details.is_empty() {
            self.details.push_str("; ");
        }
        self.details.push_str(&details.to_string());
        self
    }

    /// An error from another one, whose causes become the details.
    pub fn from_error(code: Code, error: &dyn std::error::Error) -> Self {
        let mut new = Self::new(code, error.to_string());
        let mut cause = error.source();
        while let Some(next) = cause {
            new = new.with(next);
            cause = next.source();
        }
        new
    }

    /// As the runtime reads it.
    #[must_use]
    pub fn to_json(&self, version: Version) -> Value {
        json!({
            "cniVersion": version.as_str(),
            "code": self.code as u8,
            "msg": self.message,
            "details": self.details,
        })
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code as u8)?;
        if !self.details.is_empty() {
            write!(f, ": {}", self.details)?;
        }
        Ok(())
    }
}

impl std::error::Error for CniError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_specifications_and_ours_begin_at_100() {
        let numbers = Code::ALL.map(|code| code as u8);
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 11, 50, 51, 100, 101, 102]);
    }

    #[test]
    fn an_error_is_json_that_a_runtime_reads() {
        let error = CniError::new(Code::TryAgain, "no network yet").with("start the agent");
        assert_eq!(
            error.to_json(Version::V1_0_0),
            json!({"cniVersion": "1.0.0", "code": 11, "msg": "no network yet", "details": "start the agent"})
        );
    }

    #[test]
    fn causes_become_details() {
        let source = std::io::Error::from_raw_os_error(28);
        let error = mesh_api::cni::NetworkError::Read("/x".into(), source);
        let error = CniError::from_error(Code::TryAgain, &error);
        assert_eq!(error.message, "cannot read /x");
        assert!(error.details.contains("No space"), "{error}");
    }
}
