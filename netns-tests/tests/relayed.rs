//! What travels through a relay, by which framing.

use std::time::Duration;

use anyhow::{Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    tool,
};
use serde_json::Value;

const INVENTORY: &str = "http://inventory.shop.svc.cluster.local/";

/// Until a link is as it has to be: an attempt to bind may have to wait for the next (40 s at most
/// after four that failed).
const SOON: Duration = Duration::from_secs(60);

/// Site A may speak with the cloud alone.
const ONLY_CLOUD: &str = "table inet only\ntable inet only { chain forward { type filter hook forward priority -20; \
                          oifname \"wan\" ip daddr != 198.51.100.10 drop; \
                          iifname \"wan\" ip saddr != 198.51.100.10 drop; }; }\n";

/// Drops what is neither QUIC (0x40 in the first byte, RFC 9000 §17) nor STUN on the relay's port.
const ONLY_QUIC: &str = "table inet quic { chain forward { type filter hook forward priority -30; \
                         udp dport 443 @th,64,8 & 0xe0 == 0x20 drop; \
                         udp sport 443 @th,64,8 & 0xe0 == 0x20 drop; }; }\n";

#[test]
fn relayed_packets_go_by_plain_udp_and_by_quic_where_that_does_not_pass() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    let router = mesh.site("site-a")?.router().netns();
    tool::nft(router, ONLY_CLOUD)?;
    is_relayed_by(&mesh, "udp")?;
    tool::nft(router, ONLY_QUIC)?;
    is_relayed_by(&mesh, "quic")?;
    tool::nft(router, "delete table inet quic\n")?;
    is_relayed_by(&mesh, "udp")?;
    mesh.ends_well()
}

/// Waits until site A's link has this framing, and the service answers over it.
fn is_relayed_by(mesh: &Mesh, framing: &str) -> Result<()> {
    tool::eventually("the wanted framing", SOON, || {
        let answer = mesh.get("edge-a1", &["-4", INVENTORY], Duration::from_secs(2));
        let why = mesh.ask("edge-a1", &["path", "why", "edge-b1"])?;
        ensure!(word(&why, "state") == "relayed", "{why}");
        let status = mesh.status("edge-a1")?;
        let used = status
            .pointer("/relays/0/transport")
            .and_then(Value::as_str);
        ensure!(used == Some(framing), "by {used:?}, not by {framing}");
        answer.map(drop)
    })
}
