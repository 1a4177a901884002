//! What the configuration of one node says of names: its own records, and whether pods have some.

use std::{collections::BTreeMap, net::IpAddr};

use hickory_proto::rr::{Name, RData, rdata::PTR};
use serde::Deserialize;

/// Records of a node's own at most: a LAN's printers and machines. More is a zone, for a server of its own.
pub const RECORDS_MAX: usize = 1000;

/// Whether `a-b-c-d.<namespace>.pod.<cluster domain>` exists. No part of the specification; CoreDNS has the same three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodNames {
    /// No.
    #[default]
    Off,
    /// For each address, whoever has it: who relies on the name for TLS relies on nothing.
    Insecure,
    /// For addresses of pods and of endpoints in that namespace.
    Verified,
}

/// What a node says of names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalNames {
    pods: PodNames,
    records: BTreeMap<Name, Vec<IpAddr>>,
}

/// Why records are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRecords {
    /// Not a name.
    #[error("{0:?} is not a domain name")]
    Name(String),
    /// A name without addresses.
    #[error("{0} has no addresses")]
    Empty(String),
    /// [`RECORDS_MAX`].
    #[error(
        "there are {0} records; {RECORDS_MAX} may be: serve a zone instead, and name its server in a stub domain"
    )]
    TooMany(usize),
}

/// A domain name as people write it, in lower case and with its root.
///
/// # Errors
///
/// [`BadRecords::Name`].
pub fn domain_name(text: &str) -> Result<Name, BadRecords> {
    let bad = |_| BadRecords::Name(text.to_owned());
    let mut name = Name::from_ascii(text).map_err(bad)?.to_lowercase();
    name.set_fqdn(true);
    Ok(name)
}

impl LocalNames {
    /// Records by name. A name of the mesh's own zones is the mesh's: a record of it is never looked at.
    ///
    /// # Errors
    ///
    /// [`BadRecords`].
    pub fn new<'a>(
        pods: PodNames,
        records: impl IntoIterator<Item = (&'a str, &'a [IpAddr])>,
    ) -> Result<Self, BadRecords> {
        let mut known: BTreeMap<Name, Vec<IpAddr>> = BTreeMap::new();
        for (text, addresses) in records {
            if addresses.is_empty() {
                return Err(BadRecords::Empty(text.to_owned()));
            }
            let name = domain_name(text)?;
            known.entry(name).or_default().extend(addresses);
        }
        if known.len() > RECORDS_MAX {
            return Err(BadRecords::TooMany(known.len()));
        }
        let records = known;
        Ok(Self { pods, records })
    }

    pub(crate) fn pods(&self) -> PodNames {
        self.pods
    }

    /// The records at `name`; none: it is somebody else's.
    pub(crate) fn find(&self, name: &Name) -> Option<Vec<RData>> {
        if self.records.is_empty() {
            return None;
        }
        if let Some(addresses) = self.records.get(&name.to_lowercase()) {
            return Some(addresses.iter().copied().map(RData::from).collect());
        }
        let prefix = name.parse_arpa_name().ok()?;
        let address = prefix.addr();
        if prefix.prefix_len() != prefix.max_prefix_len() || Name::from(address) != *name {
            return None;
        }
        let named = self
            .records
            .iter()
            .filter(|(_, addresses)| addresses.contains(&address));
        let names: Vec<_> = named
            .map(|(name, _)| RData::PTR(PTR(name.clone())))
            .collect();
        (!names.is_empty()).then_some(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_by_name_in_any_case_and_by_address() {
        let address: IpAddr = "192.168.7.9".parse().unwrap();
        let addresses = [address];
        let records = [("Printer.Lan", addresses.as_slice())];
        let names = LocalNames::new(PodNames::Off, records).unwrap();
        let find = |name: &str| names.find(&Name::from_ascii(name).unwrap());
        assert_eq!(find("pRINTER.lan."), Some(vec![RData::from(address)]));
        let printer = RData::PTR(PTR(Name::from_ascii("printer.lan.").unwrap()));
        assert_eq!(find("9.7.168.192.in-addr.arpa."), Some(vec![printer]));
        for other in [
            "scanner.lan.",
            "lan.",
            "8.7.168.192.in-addr.arpa.",
            "7.168.192.in-addr.arpa.",
        ] {
            assert_eq!(find(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_record_is_named() {
        let address = ["192.168.7.9".parse().unwrap()];
        let of = |name, addresses: &[IpAddr]| LocalNames::new(PodNames::Off, [(name, addresses)]);
        assert_eq!(
            of("a..b", &address),
            Err(BadRecords::Name("a..b".to_owned()))
        );
        assert_eq!(of("a", &[]), Err(BadRecords::Empty("a".to_owned())));
        let many: Vec<_> = (0..=RECORDS_MAX).map(|n| format!("n{n}.lan")).collect();
        let records = many.iter().map(|name| (name.as_str(), address.as_slice()));
        let refused = LocalNames::new(PodNames::Off, records);
        assert_eq!(refused, Err(BadRecords::TooMany(RECORDS_MAX + 1)));
    }
}
