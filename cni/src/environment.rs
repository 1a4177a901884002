//! What the runtime says in the environment.

use std::path::PathBuf;

use mesh_api::cni::PodName;

use crate::error::{CniError, Code};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Connect a pod.
    Add,
    /// Disconnect it.
    Del,
    /// Say whether it is as ADD left it.
    Check,
    /// Remove what is not listed.
    Gc,
    /// Say whether ADD would work.
    Status,
    /// Say which versions are answered.
    Version,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Add,
        Self::Del,
        Self::Check,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    /// As `CNI_COMMAND` has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// Longest `CNI_CONTAINERID`: runtimes have 64 hexadecimal digits. With the network's name and the interface's it must
/// fit into what the kernel notes at an interface (255 bytes).
pub const CONTAINER_ID_LEN_MAX: usize = 128;

/// `IFNAMSIZ` of linux/if.h, less the 0 at its end.
pub const INTERFACE_LEN_MAX: usize = 15;

/// Longest `CNI_ARGS`: five pairs, of which a pod's name and namespace have at most 253 bytes each.
pub const ARGS_LEN_MAX: usize = 16 << 10;

/// An attachment, as the environment says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_NETNS`, if given.
    pub netns: Option<PathBuf>,
    /// `K8S_POD_NAMESPACE` and `K8S_POD_NAME` of `CNI_ARGS`, if both are there.
    pub pod: Option<PodName>,
}

/// What `CNI_COMMAND` says.
///
/// # Errors
///
/// [`Code::BadEnvironment`] if it is missing or none of the six.
pub fn verb(lookup: impl Fn(&str) -> Option<String>) -> Result<Verb, CniError> {
    let text = lookup("CNI_COMMAND").unwrap_or_default();
    let found = Verb::ALL.into_iter().find(|verb| verb.as_str() == text);
    found.ok_or_else(|| {
        let all = Verb::ALL.map(Verb::as_str).join(", ");
        bad(format!("CNI_COMMAND is {text:?}")).with(format!("it has to be one of {all}"))
    })
}

/// The attachment that ADD, DEL or CHECK is for. Only DEL does without `CNI_NETNS`.
///
/// # Errors
///
/// [`Code::BadEnvironment`], with all variables that are missing or wrong.
pub fn target(verb: Verb, lookup: impl Fn(&str) -> Option<String>) -> Result<Target, CniError> {
    let get = |name: &str| lookup(name).filter(|value| !value.is_empty());
    let mut problems = Vec::new();
    let container = get("CNI_CONTAINERID").unwrap_or_default();
    if !is_id(&container, CONTAINER_ID_LEN_MAX) {
        problems.push(format!(
            "CNI_CONTAINERID is {container:?}, not 1 to {CONTAINER_ID_LEN_MAX} letters, digits, `_`, `.`, `-` \
             that begin with a letter or a digit"
        ));
    }
    let interface = get("CNI_IFNAME").unwrap_or_default();
    if !is_interface(&interface) {
        problems.push(format!(
            "CNI_IFNAME is {interface:?}, not 1 to {INTERFACE_LEN_MAX} bytes without `/`, `:` and spaces"
        ));
    }
    let netns = get("CNI_NETNS").map(PathBuf::from);
    if netns.is_none() && verb != Verb::Del {
        problems.push("CNI_NETNS is not set".to_owned());
    }
    let pod = match args(&get("CNI_ARGS").unwrap_or_default()) {
        Ok(pod) => pod,
        Err(problem) => {
            problems.push(problem);
            None
        }
    };
    if problems.is_empty() {
        return Ok(Target {
            container,
            interface,
            netns,
            pod,
        });
    }
    Err(bad(format!("{}: {}", verb.as_str(), problems.join("; "))))
}

fn bad(message: String) -> CniError {
    CniError::new(Code::BadEnvironment, message)
}

/// The specification's rule for container ids and names of networks.
pub(crate) fn is_id(text: &str, len_max: usize) -> bool {
    let begins_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    let part = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    begins_well && text.len() <= len_max && text.bytes().all(part)
}

fn is_interface(text: &str) -> bool {
    let fits = !text.is_empty() && text.len() <= INTERFACE_LEN_MAX;
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    fits && text != "." && text != ".." && !text.contains(bad)
}

/// Keys that Kubernetes' runtimes set, besides those that are used.
const KNOWN_ARGS: [&str; 3] = ["K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID", "IgnoreUnknown"];

fn args(text: &str) -> Result<Option<PodName>, String> {
    if text.len() > ARGS_LEN_MAX {
        return Err(format!("CNI_ARGS has more than {ARGS_LEN_MAX} bytes"));
    }
    let mut pairs = Vec::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| format!("CNI_ARGS has {pair:?}, which is no KEY=VALUE"))?;
        pairs.push((key, value));
    }
    let value = |wanted: &str| {
        let mut found = pairs.iter().filter(|(key, _)| *key == wanted);
        found.next().map(|(_, value)| *value)
    };
    let ignore = match value("IgnoreUnknown") {
        None => false,
        Some(text) if ["1", "t", "T", "true", "TRUE", "True"].contains(&text) => true,
        Some(text) if ["0", "f", "F", "false", "FALSE", "False"].contains(&text) => false,
        Some(text) => return Err(format!("CNI_ARGS has IgnoreUnknown={text}: 1 or 0")),
    };
    let (namespace, name) = ("K8S_POD_NAMESPACE", "K8S_POD_NAME");
    let is_known = |key: &str| KNOWN_ARGS.contains(&key) || key == namespace || key == name;
    if let Some((key, _)) = pairs.iter().find(|(key, _)| !ignore && !is_known(key)) {
        return Err(format!(
            "CNI_ARGS has {key}, which is not known: take it out, or add IgnoreUnknown=1"
        ));
    }
    let pod = value(namespace).zip(value(name));
    Ok(pod.map(|(namespace, name)| PodName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: [(&str, &str); 3] = [
        ("CNI_CONTAINERID", "c-1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/c-1"),
    ];

    fn with(changes: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        let pairs: Vec<(String, String)> = changes
            .iter()
            .chain(&GOOD)
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        move |wanted| {
            let mut found = pairs.iter().filter(|(key, _)| key == wanted);
            found.next().map(|(_, value)| value.clone())
        }
    }

    #[track_caller]
    fn refused(verb: Verb, changes: &[(&str, &str)], word: &str) {
        let error = target(verb, with(changes)).unwrap_err();
        assert_eq!(error.code, Code::BadEnvironment, "{changes:?}");
        assert!(error.message.contains(word), "{error}");
    }

    #[test]
    fn verbs_are_the_six() {
        for wanted in Verb::ALL {
            assert_eq!(verb(with(&[("CNI_COMMAND", wanted.as_str())])), Ok(wanted));
        }
        for other in ["", "add", "ADD ", "PREP"] {
            let error = verb(with(&[("CNI_COMMAND", other)])).unwrap_err();
            assert_eq!(error.code, Code::BadEnvironment);
        }
    }

    #[test]
    fn what_a_runtime_says_is_read() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;OTHER=x";
        let found = target(Verb::Add, with(&[("CNI_ARGS", args)])).unwrap();
        assert_eq!(found.container, "c-1");
        assert_eq!(found.interface, "eth0");
        assert_eq!(found.netns, Some("/run/netns/c-1".into()));
        let pod = found.pod.unwrap();
        assert_eq!(
            (pod.namespace.as_str(), pod.name.as_str()),
            ("shop", "web-0")
        );
    }

    #[test]
    fn each_wrong_variable_is_told() {
        let long_id = "c".repeat(CONTAINER_ID_LEN_MAX + 1);
        let long_args = "A=".repeat(ARGS_LEN_MAX);
        for (changes, word) in [
            (("CNI_CONTAINERID", ""), "CNI_CONTAINERID"),
            (("CNI_CONTAINERID", "../c"), "CNI_CONTAINERID"),
            (("CNI_CONTAINERID", "-c"), "CNI_CONTAINERID"),
            (("CNI_CONTAINERID", "c d"), "CNI_CONTAINERID"),
            (("CNI_CONTAINERID", long_id.as_str()), "CNI_CONTAINERID"),
            (("CNI_IFNAME", ""), "CNI_IFNAME"),
            (("CNI_IFNAME", "."), "CNI_IFNAME"),
            (("CNI_IFNAME", "a/b"), "CNI_IFNAME"),
            (("CNI_IFNAME", "a:b"), "CNI_IFNAME"),
            (("CNI_IFNAME", "sixteen-bytes-ab"), "CNI_IFNAME"),
            (("CNI_NETNS", ""), "CNI_NETNS"),
            (("CNI_ARGS", "K8S_POD_NAME"), "KEY=VALUE"),
            (("CNI_ARGS", "COLOUR=red"), "COLOUR"),
            (("CNI_ARGS", "IgnoreUnknown=0;COLOUR=red"), "COLOUR"),
            (("CNI_ARGS", "IgnoreUnknown=maybe"), "IgnoreUnknown"),
            (("CNI_ARGS", long_args.as_str()), "CNI_ARGS"),
        ] {
            refused(Verb::Add, &[changes], word);
        }
    }

    #[test]
    fn all_wrong_variables_are_told_at_once() {
        let changes = [
            ("CNI_CONTAINERID", ""),
            ("CNI_IFNAME", ""),
            ("CNI_NETNS", ""),
        ];
        for word in ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"] {
            refused(Verb::Check, &changes, word);
        }
    }

    #[test]
    fn del_does_without_a_namespace() {
        let found = target(Verb::Del, with(&[("CNI_NETNS", "")])).unwrap();
        assert_eq!(found.netns, None);
    }
}
