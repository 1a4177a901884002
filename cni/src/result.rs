//! Results: ours in the version that was asked for, and those of plug-ins before us, as far as they are read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_api::cni::{Attachment, VethRecord};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    config::show_mac,
    error::{CniError, Code},
    version::Version,
};

/// Pods' IPv4 gateway. No interface has the address: pods know by heart to which link-layer address it belongs.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Pods' IPv6 gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The gateway for a family.
#[must_use]
pub fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}

/// Everywhere, in a family.
#[must_use]
pub fn everywhere(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => ipnet::Ipv4Net::default().into(),
        IpAddr::V6(_) => ipnet::Ipv6Net::default().into(),
    }
}

/// ADD's result for a veth of ours.
#[must_use]
pub fn render(
    version: Version,
    attachment: &Attachment,
    veth: &VethRecord,
    dns: Option<&Value>,
) -> Value {
    let mut host = json!({
        "name": attachment.id.key(),
        "mac": show_mac(veth.host_mac),
    });
    let mut pod = json!({
        "name": attachment.id.interface,
        "mac": show_mac(veth.mac),
        "sandbox": attachment.netns,
    });
    if version >= Version::V1_1_0 {
        for interface in [&mut host, &mut pod] {
            set(interface, "mtu", json!(veth.mtu_bytes));
        }
    }
    let ips = attachment.addresses.iter().map(|address| {
        let mut ip = json!({
            "address": IpNet::from(*address).to_string(),
            "gateway": gateway(*address),
            "interface": 1,
        });
        if version < Version::V1_0_0 {
            set(
                &mut ip,
                "version",
                json!(if address.is_ipv4() { "4" } else { "6" }),
            );
        }
        ip
    });
    let routes = attachment
        .addresses
        .iter()
        .map(|address| json!({"dst": everywhere(*address).to_string(), "gw": gateway(*address)}));
    let empty = json!({});
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [host, pod],
        "ips": ips.collect::<Vec<_>>(),
        "routes": routes.collect::<Vec<_>>(),
        "dns": dns.unwrap_or(&empty),
    })
}

fn set(object: &mut Value, key: &str, value: Value) {
    if let Some(fields) = object.as_object_mut() {
        fields.insert(key.to_owned(), value);
    }
}

/// A result of ADD, as far as it is read.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Previous {
    /// All interfaces.
    #[serde(default)]
    pub interfaces: Vec<PreviousInterface>,
    /// All addresses.
    #[serde(default)]
    pub ips: Vec<PreviousIp>,
}

/// An interface of a result.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PreviousInterface {
    /// Its name.
    pub name: String,
    /// The network namespace that it is in; empty for the node's.
    #[serde(default)]
    pub sandbox: String,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PreviousIp {
    /// The address, with the length of its prefix.
    pub address: IpNet,
    /// Its interface's place in the list.
    pub interface: Option<usize>,
}

impl Previous {
    /// Reads a `prevResult`.
    ///
    /// # Errors
    ///
    /// [`Code::Decode`] if it is none.
    pub fn read(value: &Value) -> Result<Self, CniError> {
        let bad = || CniError::new(Code::Decode, "prevResult is no result of ADD");
        if !value.is_object() {
            return Err(bad().with("it is no object"));
        }
        Self::deserialize(value).map_err(|error| bad().with(error))
    }

    /// The addresses of the pod's interface `name`. Plug-ins that do not say whose they are mean it.
    #[must_use]
    pub fn addresses(&self, name: &str) -> Vec<IpAddr> {
        let is_its = |ip: &&PreviousIp| {
            let interface = ip.interface.and_then(|place| self.interfaces.get(place));
            interface
                .is_none_or(|interface| interface.name == name && !interface.sandbox.is_empty())
        };
        self.ips
            .iter()
            .filter(is_its)
            .map(|ip| ip.address.addr())
            .collect()
    }

    /// Whether the node has an interface `name` in this result.
    #[must_use]
    pub fn has_host_interface(&self, name: &str) -> bool {
        let mut interfaces = self.interfaces.iter();
        interfaces.any(|interface| interface.name == name && interface.sandbox.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::cni::AttachmentId;

    use super::*;

    fn rendered(version: Version) -> Value {
        let veth = VethRecord {
            mac: [10, 0, 0, 0, 0, 1],
            host_mac: [14, 0, 0, 0, 0, 1],
            mtu_bytes: 1_400,
        };
        let attachment = Attachment {
            id: AttachmentId {
                network: "mesh".to_owned(),
                container: "c1".to_owned(),
                interface: "eth0".to_owned(),
            },
            netns: "/run/netns/c1".into(),
            host: None,
            addresses: vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            veth: Some(veth),
            pod: None,
        };
        render(version, &attachment, &veth, None)
    }

    #[test]
    fn a_result_says_what_was_made() {
        let result = rendered(Version::V1_1_0);
        let key = result["interfaces"][0]["name"].as_str().unwrap().to_owned();
        assert_eq!(
            result,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": key, "mac": "0e:00:00:00:00:01", "mtu": 1400},
                    {"name": "eth0", "mac": "0a:00:00:00:00:01", "mtu": 1400, "sandbox": "/run/netns/c1"},
                ],
                "ips": [
                    {"address": "10.1.0.2/32", "gateway": "169.254.1.1", "interface": 1},
                    {"address": "fd00::2/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [
                    {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                    {"dst": "::/0", "gw": "fe80::1"},
                ],
                "dns": {},
            })
        );
    }

    #[test]
    fn each_version_gets_its_own_fields() {
        for version in Version::ALL {
            let result = rendered(version);
            assert_eq!(result["cniVersion"], version.as_str());
            assert_eq!(
                result["ips"][1]["version"] == "6",
                version < Version::V1_0_0
            );
            assert_eq!(
                result["interfaces"][0]["mtu"] == 1400,
                version >= Version::V1_1_0
            );
        }
    }

    #[test]
    fn a_result_of_the_bridge_plug_in_is_read() {
        let result = json!({
            "cniVersion": "0.4.0",
            "interfaces": [
                {"name": "cni0", "mac": "aa:00:00:00:00:01"},
                {"name": "veth1", "mac": "aa:00:00:00:00:02"},
                {"name": "eth0", "mac": "aa:00:00:00:00:03", "sandbox": "/run/netns/c"},
            ],
            "ips": [
                {"version": "4", "interface": 2, "address": "10.2.0.5/24", "gateway": "10.2.0.1"},
                {"version": "4", "interface": 0, "address": "10.2.0.1/24"},
            ],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {},
        });
        let previous = Previous::read(&result).unwrap();
        assert_eq!(
            previous.addresses("eth0"),
            ["10.2.0.5".parse::<IpAddr>().unwrap()]
        );
        assert!(previous.has_host_interface("veth1"));
        assert!(!previous.has_host_interface("eth0"));
    }

    #[test]
    fn what_is_no_result_is_told() {
        for bad in [
            json!([]),
            json!({"ips": [{"address": "10.2.0.5"}]}),
            json!({"interfaces": [{}]}),
        ] {
            assert_eq!(
                Previous::read(&bad).unwrap_err().code,
                Code::Decode,
                "{bad}"
            );
        }
    }
}
