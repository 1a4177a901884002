//! Which interface datagrams leave by, on a machine with several ways out.
//!
//! One interface is named at each send (`IP_PKTINFO`, `IPV6_PKTINFO`): the kernel then takes the best of
//! that interface's own routes, also where another one has a better metric, and the source address
//! that belongs to it. Reception stays as it is, on every interface. What the kernel knows better than
//! by a default route is left to it: peers on a LAN are reached by the LAN. Why so, and not otherwise:
//!
//! * `SO_BINDTODEVICE` on the node's port would shut out all other interfaces, in both directions.
//! * `IP_UNICAST_IF` names the interface for all destinations: those on the link of another interface
//!   would go to the named one's gateway (Linux 6.18, tried).
//! * `SO_MARK` with policy rules needs rules and a table that outlive a crash, and numbers for marks,
//!   rules and tables that other programs (wg-quick, Kubernetes' network plug-ins) may use too.
//!
//! Limits: the interface must have its default route in the main table. Where reverse path filtering is
//! strict (`rp_filter` 1), the kernel drops what comes in by an interface that its own routes do not prefer.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_linux::{IfIndex, udp::LocalEnd};

/// The way out in use, and what does not go by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Egress {
    link: IfIndex,
    /// Disjoint and in order, so that one comparison in log₂ n steps finds the only candidate.
    nearer: Vec<IpNet>,
}

impl Egress {
    /// By `link`, but for what is in one of `nearer`.
    #[must_use]
    pub fn new(link: IfIndex, nearer: &Vec<IpNet>) -> Self {
        let nearer = IpNet::aggregate(nearer);
        Self { link, nearer }
    }

    /// The interface in use.
    #[must_use]
    pub fn link(&self) -> IfIndex {
        self.link
    }

    /// The interface for packets to `ip`; `None`: the kernel's routes choose.
    #[must_use]
    pub fn towards(&self, ip: IpAddr) -> Option<IfIndex> {
        let ip = ip.to_canonical();
        let behind = self.nearer.partition_point(|net| net.network() <= ip);
        let candidate = behind.checked_sub(1).and_then(|at| self.nearer.get(at));
        let is_near = candidate.is_some_and(|net| net.contains(&ip));
        (!is_near).then_some(self.link)
    }

    /// The same for packets that answer what came to `end`: by where that came.
    pub(crate) fn answering(&self, to: SocketAddr, end: Option<LocalEnd>) -> Option<IfIndex> {
        let link = self.towards(to.ip())?;
        Some(end.and_then(|end| end.link).unwrap_or(link))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(number: u32) -> IfIndex {
        IfIndex::new(number).unwrap()
    }

    fn egress(nearer: &[&str]) -> Egress {
        let nearer = nearer.iter().map(|net| net.parse().unwrap()).collect();
        Egress::new(index(3), &nearer)
    }

    #[test]
    fn all_goes_by_the_interface_but_what_the_kernel_knows_better() {
        let egress = egress(&[
            "192.168.1.0/24",
            "10.0.0.0/8",
            "10.7.0.0/16",
            "10.8.1.1/32",
            "fd00::/64",
        ]);
        for (ip, near) in [
            ("192.168.1.0", true),
            ("192.168.1.255", true),
            ("192.168.2.0", false),
            ("192.168.0.255", false),
            // Inside a longer prefix, and behind it inside the shorter one.
            ("10.7.0.1", true),
            ("10.9.0.1", true),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("::ffff:10.1.2.3", true),
            ("fd00::1", true),
            ("fd00:0:0:1::1", false),
            ("::", false),
            ("ffff::", false),
        ] {
            let towards = egress.towards(ip.parse().unwrap());
            assert_eq!(towards, (!near).then_some(index(3)), "{ip}");
        }
    }

    #[test]
    fn without_nearer_routes_everything_does() {
        let any = "127.0.0.1".parse().unwrap();
        assert_eq!(egress(&[]).towards(any), Some(index(3)));
    }

    #[test]
    fn who_is_answered_is_answered_by_where_it_came() {
        let egress = egress(&["10.0.0.0/8"]);
        let end = |link| {
            Some(LocalEnd {
                address: "192.0.2.1".parse().unwrap(),
                link,
            })
        };
        let answering = |to: &str, end| egress.answering(to.parse().unwrap(), end);
        assert_eq!(
            answering("198.51.100.1:1", end(Some(index(4)))),
            Some(index(4))
        );
        assert_eq!(answering("198.51.100.1:1", end(None)), Some(index(3)));
        assert_eq!(answering("198.51.100.1:1", None), Some(index(3)));
        assert_eq!(answering("10.0.0.1:1", end(Some(index(4)))), None);
    }
}
