//! The network configuration: as the runtime writes it, then checked.

use std::{
    collections::BTreeSet,
    io::Read,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use mesh_api::cni::{ADDRESSES_MAX, AttachmentId, STATE_DIR};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    environment::{Target, is_id},
    error::{CniError, Code},
    version::Version,
};

/// Largest configuration: GC lists 4,096 attachments at some 120 bytes, and `prevResult` has some kilobytes.
pub const CONFIG_LEN_MAX: u64 = 4 << 20;

/// Longest name of a network. See [`crate::environment::CONTAINER_ID_LEN_MAX`].
pub const NETWORK_LEN_MAX: usize = 96;

/// A network configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The version that the runtime wants to be answered in.
    pub version: Version,
    /// The network's name.
    pub network: String,
    /// `stateDir`: where attachments are, and what the agent wrote.
    pub state_dir: PathBuf,
    /// `chained`: there must be another plug-in before this one.
    pub chained: bool,
    /// `masquerade`: what pods send out of the mesh leaves as the node's.
    pub masquerade: bool,
    /// `runtimeConfig.ips`: addresses that the pod must get.
    pub ips: Vec<IpAddr>,
    /// `runtimeConfig.mac`: the link-layer address that it must get.
    pub mac: Option<[u8; 6]>,
    /// `dns`, which the result repeats.
    pub dns: Option<Value>,
    /// `prevResult`, as it came.
    pub prev_result: Option<Value>,
    /// `cni.dev/valid-attachments`: what GC leaves alone.
    pub valid: Option<BTreeSet<AttachmentId>>,
}

impl Config {
    /// What `target` is known by.
    #[must_use]
    pub fn id(&self, target: &Target) -> AttachmentId {
        AttachmentId {
            network: self.network.clone(),
            container: target.container.clone(),
            interface: target.interface.clone(),
        }
    }
}

/// Fields that are used, and those that libraries of runtimes put in or that mean nothing to a plug-in that makes no
/// choice by them.
const FIELDS: [&str; 15] = [
    "cniVersion",
    "name",
    "type",
    "stateDir",
    "chained",
    "masquerade",
    "runtimeConfig",
    "dns",
    "prevResult",
    "capabilities",
    "args",
    "cniVersions",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
];

/// Reads what the runtime writes to the standard input.
///
/// # Errors
///
/// [`Code::Io`] if that fails, [`Code::Decode`] if it is no JSON object, or too large.
pub fn read(input: impl Read) -> Result<Map<String, Value>, CniError> {
    let mut text = Vec::new();
    let read = input.take(CONFIG_LEN_MAX + 1).read_to_end(&mut text);
    read.map_err(|error| {
        CniError::new(Code::Io, "cannot read the network configuration from stdin").with(error)
    })?;
    if text.len() as u64 > CONFIG_LEN_MAX {
        let message = format!("the network configuration has more than {CONFIG_LEN_MAX} bytes");
        return Err(CniError::new(Code::Decode, message));
    }
    serde_json::from_slice(&text).map_err(|error| {
        CniError::new(
            Code::Decode,
            "the network configuration on stdin is no JSON object",
        )
        .with(error)
    })
}

/// The version that the runtime wants to be answered in.
///
/// # Errors
///
/// [`Code::IncompatibleVersion`] if it is none of ours. One without is of a version before 0.3.1.
pub fn version(fields: &Map<String, Value>) -> Result<Version, CniError> {
    match fields.get("cniVersion") {
        Some(Value::String(text)) => Version::parse(text),
        None => Version::parse("0.1.0"),
        Some(other) => Err(wrong("cniVersion", other, "a string")),
    }
}

/// Checks the configuration.
///
/// # Errors
///
/// [`Code::IncompatibleVersion`], [`Code::UnsupportedField`] with the field and its value, or [`Code::BadConfig`].
pub fn check(mut fields: Map<String, Value>) -> Result<Config, CniError> {
    let version = version(&fields)?;
    let foreign = |key: &str| !FIELDS.contains(&key) && !key.starts_with("cni.dev/");
    if let Some((key, value)) = fields.iter().find(|(key, _)| foreign(key)) {
        return Err(unsupported(key, value));
    }
    let network = match fields.get("name") {
        Some(Value::String(name)) if is_id(name, NETWORK_LEN_MAX) => name.clone(),
        other => {
            let form = "1 to 96 letters, digits, `_`, `.`, `-` that begin with a letter or a digit";
            return Err(wrong("name", other.unwrap_or(&Value::Null), form));
        }
    };
    let state_dir = match fields.get("stateDir") {
        None => PathBuf::from(STATE_DIR),
        Some(Value::String(path)) if Path::new(path).is_absolute() => PathBuf::from(path),
        Some(other) => return Err(wrong("stateDir", other, "an absolute path")),
    };
    let [chained, masquerade] = ["chained", "masquerade"].map(|key| match fields.get(key) {
        None => Ok(false),
        Some(Value::Bool(said)) => Ok(*said),
        Some(other) => Err(wrong(key, other, "true or false")),
    });
    let (chained, masquerade) = (chained?, masquerade?);
    let (ips, mac) = match present(&fields, "runtimeConfig") {
        None => (Vec::new(), None),
        Some(Value::Object(runtime)) => (ips(runtime)?, mac(runtime)?),
        Some(other) => return Err(wrong("runtimeConfig", other, "an object")),
    };
    let valid = match fields.get("cni.dev/valid-attachments") {
        None => None,
        Some(value) => Some(valid(&network, value)?),
    };
    Ok(Config {
        version,
        network,
        state_dir,
        chained,
        masquerade,
        ips,
        mac,
        dns: present(&fields, "dns").cloned(),
        prev_result: fields.remove("prevResult").filter(|value| !value.is_null()),
        valid,
    })
}

fn present<'a>(fields: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    fields.get(key).filter(|value| !value.is_null())
}

fn wrong(key: &str, value: &Value, form: &str) -> CniError {
    let message = format!("the network configuration's {key} is {value}: it has to be {form}");
    CniError::new(Code::BadConfig, message)
}

fn unsupported(key: &str, value: &Value) -> CniError {
    let message =
        format!("the network configuration's {key} is not supported; its value is {value}");
    let hint = match key {
        "portMappings" => "chain the plug-in `portmap` behind, and give the capability to that one",
        "bandwidth" => "chain the plug-in `bandwidth` behind, and give the capability to that one",
        "ipam" => "take it out: addresses are from the node's pod ranges",
        _ => "take it out, or mend its spelling",
    };
    CniError::new(Code::UnsupportedField, message).with(hint)
}

fn ips(runtime: &Map<String, Value>) -> Result<Vec<IpAddr>, CniError> {
    let known = ["ips", "mac"];
    let is_foreign =
        |(key, value): &(&String, &Value)| !known.contains(&key.as_str()) && !value.is_null();
    if let Some((key, value)) = runtime.iter().find(is_foreign) {
        return Err(unsupported(key, value));
    }
    let Some(value) = present(runtime, "ips") else {
        return Ok(Vec::new());
    };
    let form = "a list of addresses, one of each family at most";
    let bad = || wrong("runtimeConfig.ips", value, form);
    let list = value.as_array().ok_or_else(bad)?;
    let mut found: Vec<IpAddr> = Vec::new();
    for item in list {
        let text = item.as_str().ok_or_else(bad)?;
        // Both forms are in use; the prefix says nothing that the node's range does not.
        let net: Option<IpNet> = text.parse().ok();
        let address = net.map(|net| net.addr()).or_else(|| text.parse().ok());
        let address = address.ok_or_else(bad)?;
        if found
            .iter()
            .any(|other| other.is_ipv4() == address.is_ipv4())
        {
            return Err(bad());
        }
        found.push(address);
    }
    debug_assert!(found.len() <= ADDRESSES_MAX);
    Ok(found)
}

fn mac(runtime: &Map<String, Value>) -> Result<Option<[u8; 6]>, CniError> {
    let Some(value) = present(runtime, "mac") else {
        return Ok(None);
    };
    let mac = value.as_str().and_then(parse_mac);
    // Group addresses belong to nobody (IEEE 802, the first byte's lowest bit).
    let usable = mac
        .filter(|[first, ..]| first & 1 == 0)
        .filter(|mac| mac != &[0; 6]);
    let form = "six bytes as 02:00:00:00:00:01, of no group";
    usable
        .map(Some)
        .ok_or_else(|| wrong("runtimeConfig.mac", value, form))
}

/// Reads six hexadecimal bytes with `:` between.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes = text.split(':').map(|part| {
        let form = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        u8::from_str_radix(part, 16).ok().filter(|_| form)
    });
    bytes.collect::<Option<Vec<u8>>>()?.try_into().ok()
}

/// Writes what [`parse_mac`] reads.
#[must_use]
pub fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// One that libraries write as `null` is empty; one that is not there is an error of the runtime, see
/// [`Config::valid`].
fn valid(network: &str, value: &Value) -> Result<BTreeSet<AttachmentId>, CniError> {
    #[derive(Deserialize)]
    struct Listed {
        #[serde(rename = "containerID")]
        container: String,
        #[serde(rename = "ifname")]
        interface: String,
    }
    let listed: Option<Vec<Listed>> = serde_json::from_value(value.clone()).map_err(|error| {
        let form = "a list of objects with containerID and ifname";
        wrong("cni.dev/valid-attachments", value, form).with(error)
    })?;
    let ids = listed
        .unwrap_or_default()
        .into_iter()
        .map(|item| AttachmentId {
            network: network.to_owned(),
            container: item.container,
            interface: item.interface,
        });
    Ok(ids.collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> Result<Config, CniError> {
        check(read(value.to_string().as_bytes())?)
    }

    fn base() -> Value {
        json!({"cniVersion": "1.1.0", "name": "mesh", "type": "mesh-cni"})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = base();
        config[key] = value;
        config
    }

    #[track_caller]
    fn refused(code: Code, config: &Value, word: &str) {
        let error = parse(config).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(word), "{error}");
    }

    #[test]
    fn the_least_configuration_has_defaults() {
        let config = parse(&base()).unwrap();
        assert_eq!(config.network, "mesh");
        assert_eq!(config.state_dir, Path::new(STATE_DIR));
        assert!(
            !config.masquerade && !config.chained && config.ips.is_empty() && config.mac.is_none()
        );
        assert!(config.prev_result.is_none() && config.valid.is_none());
    }

    #[test]
    fn everything_that_is_supported_is_read() {
        let mut config = with("stateDir", json!("/s"));
        config["chained"] = json!(true);
        config["masquerade"] = json!(true);
        config["runtimeConfig"] =
            json!({"ips": ["10.1.0.9/24", "fd00::9"], "mac": "02:AB:00:00:00:01"});
        config["prevResult"] = json!({"ips": []});
        config["dns"] = json!({"nameservers": ["10.0.0.10"]});
        config["args"] = json!({"cni": {}});
        config["cni.dev/valid-attachments"] = json!([{"containerID": "c", "ifname": "eth0"}]);
        let config = parse(&config).unwrap();
        assert_eq!(config.ips.len(), 2);
        assert_eq!(
            config.mac.map(show_mac).as_deref(),
            Some("02:ab:00:00:00:01")
        );
        assert!(
            config.masquerade
                && config.chained
                && config.prev_result.is_some()
                && config.dns.is_some()
        );
        assert_eq!(config.valid.map(|valid| valid.len()), Some(1));
    }

    #[test]
    fn no_list_is_not_an_empty_list() {
        assert_eq!(parse(&base()).unwrap().valid, None);
        let null = parse(&with("cni.dev/valid-attachments", Value::Null)).unwrap();
        assert_eq!(null.valid, Some(BTreeSet::new()));
    }

    #[test]
    fn fields_that_are_not_supported_are_told_with_their_value() {
        refused(
            Code::UnsupportedField,
            &with("stateDri", json!("/x")),
            "stateDri",
        );
        refused(
            Code::UnsupportedField,
            &with("ipam", json!({"type": "x"})),
            "\"x\"",
        );
        let mapped = with("runtimeConfig", json!({"portMappings": [{"hostPort": 80}]}));
        refused(Code::UnsupportedField, &mapped, "portMappings");
    }

    #[test]
    fn each_wrong_value_is_told() {
        for (key, value) in [
            ("name", json!("")),
            ("name", json!("a b")),
            ("name", json!(7)),
            ("name", json!("n".repeat(NETWORK_LEN_MAX + 1))),
            ("stateDir", json!("relative")),
            ("stateDir", json!(1)),
            ("chained", json!("yes")),
            ("masquerade", json!(1)),
            ("runtimeConfig", json!([])),
            ("cniVersion", json!(1)),
            ("cni.dev/valid-attachments", json!([{"containerID": "c"}])),
        ] {
            refused(Code::BadConfig, &with(key, value), key);
        }
        for (key, value) in [
            ("ips", json!("10.0.0.1")),
            ("ips", json!(["10.0.0"])),
            ("ips", json!(["10.0.0.1", "10.0.0.2"])),
            ("ips", json!([1])),
            ("mac", json!("02:00:00:00:00")),
            ("mac", json!("01:00:00:00:00:01")),
            ("mac", json!("00:00:00:00:00:00")),
            ("mac", json!("+2:00:00:00:00:01")),
        ] {
            refused(
                Code::BadConfig,
                &with("runtimeConfig", json!({key: value})),
                key,
            );
        }
    }

    #[test]
    fn a_version_that_is_missing_or_unknown_is_told() {
        refused(
            Code::IncompatibleVersion,
            &with("cniVersion", json!("2.0.0")),
            "2.0.0",
        );
        let without = json!({"name": "mesh", "type": "mesh-cni"});
        refused(Code::IncompatibleVersion, &without, "0.1.0");
    }

    #[test]
    fn what_is_no_object_or_too_large_is_told() {
        for text in ["", "[]", "{", "null", "\u{feff}{}"] {
            assert_eq!(
                read(text.as_bytes()).unwrap_err().code,
                Code::Decode,
                "{text}"
            );
        }
        let endless = std::io::repeat(b' ');
        assert_eq!(read(endless).unwrap_err().code, Code::Decode);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            if let Ok(fields) = read(bytes.as_slice()) {
                check(fields).ok();
            }
        }

        #[test]
        fn no_values_make_it_panic(key in "[a-zA-Z./-]{1,26}", text in ".{0,40}", number: i64) {
            for value in [json!(text), json!(number), json!([text]), json!({"ips": [text], "mac": text})] {
                parse(&with(&key, value.clone())).ok();
                parse(&with("runtimeConfig", value)).ok();
            }
        }
    }
}
