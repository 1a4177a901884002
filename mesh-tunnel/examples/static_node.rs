//! One end of a tunnel with one peer and one direct path that never changes: for benches, and to
//! see the packet path alone.
//!
//! ```text
//! static_node INTERFACE PRIVATE_KEY_FILE PORT OVERLAY_V6 PEER_KEY PEER_ADDRESS:PORT PREFIX…
//! ```
//!
//! Keys are base64 as `wg` writes them. Addresses, MTU and routes of the interface are the
//! caller's to set (`ip`). `WORKERS=2` in the environment makes two packet threads. Runs until standard input ends; then prints what was counted.

use std::{
    env,
    error::Error,
    fs,
    io::{self, Read as _},
    net::{Ipv6Addr, SocketAddr},
    sync::OnceLock,
};

use mesh_linux::{tun::Tun, udp::UdpPair};
use mesh_tunnel::tunnel::{PrivateKey, Tunnel, TunnelConfig, TunnelEvent};
use mesh_wire::id::{NodeId, Via};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or(format!("missing argument: {what}"));
    let interface = next("interface")?;
    let key: NodeId = fs::read_to_string(next("private key file")?)?
        .trim()
        .parse()?;
    let port: u16 = next("port")?.parse()?;
    let overlay_v6: Ipv6Addr = next("overlay IPv6 address")?.parse()?;
    let peer: NodeId = next("peer's public key")?.parse()?;
    let path = Via::Direct(next("peer's address and port")?.parse::<SocketAddr>()?);
    let prefixes: Vec<_> = arguments
        .map(|prefix| prefix.parse())
        .collect::<Result<_, _>>()?;

    let config = TunnelConfig {
        private_key: PrivateKey::new(key.0),
        overlay_v6,
    };
    // Set once the tunnel is there; until then nobody is known and nothing can be wanted.
    static TUNNEL: OnceLock<Tunnel> = OnceLock::new();
    let on_event = move |event| match (event, TUNNEL.get()) {
        (TunnelEvent::Wanted(_), Some(tunnel)) => tunnel.handshake(&peer, &[path]),
        (TunnelEvent::Handshake { .. }, Some(tunnel)) => tunnel.set_path(&peer, Some(path), None),
        (TunnelEvent::Broken(reason), _) => eprintln!("broken: {reason}"),
        _ => {}
    };
    let count = env::var("WORKERS").map_or(Ok(1), |count| count.parse())?;
    let tun = Tun::create(&interface, count)?;
    let sockets = UdpPair::bind_many(port, count)?;
    let (tunnel, workers) = Tunnel::start(tun, sockets, config, on_event)?;
    let tunnel = TUNNEL.get_or_init(|| tunnel);
    tunnel.set_known([peer].into());
    tunnel.set_routes(prefixes.into_iter().map(|prefix| (prefix, peer)).collect());
    println!("{} listens on {}", tunnel.node_id(), tunnel.port());
    io::stdin().read_to_end(&mut Vec::new())?;
    println!("{:#?}", tunnel.peer_stats(&peer));
    for (reason, count) in tunnel.stats().drops.iter().filter(|(_, count)| *count > 0) {
        println!("dropped, {}: {count}", reason.as_str());
    }
    workers.stop();
    Ok(())
}
