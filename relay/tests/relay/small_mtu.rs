//! A path on which QUIC's datagrams are too small for full-size packets.

use std::{fs::File, net::SocketAddr, process::Command, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::harness::{Mesh, Node, Quic, Relay, Transport, command, counter};

const RELAY_ADDRESS: [u8; 4] = [192, 0, 2, 1];

/// Two network namespaces and a link between them; gone when dropped.
struct Namespaces {
    relay: String,
    nodes: String,
}

impl Namespaces {
    fn with_mtu(mtu: u16) -> Self {
        let prefix = format!("hf{}-relay-{mtu}", std::process::id());
        let (relay, nodes) = (format!("{prefix}-r"), format!("{prefix}-n"));
        ip(&["netns", "add", &relay]);
        let this = Self { relay, nodes };
        ip(&["netns", "add", &this.nodes]);
        let (r, n) = (&this.relay, &this.nodes);
        ip(&[
            "-n", r, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", n,
        ]);
        for (namespace, address) in [(r, "192.0.2.1/24"), (n, "192.0.2.2/24")] {
            ip(&["-n", namespace, "addr", "add", address, "dev", "up0"]);
            ip(&[
                "-n",
                namespace,
                "link",
                "set",
                "up0",
                "mtu",
                &mtu.to_string(),
                "up",
            ]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        this
    }

    fn relay(&self, mesh: &Mesh) -> Relay {
        let any = SocketAddr::from((RELAY_ADDRESS, 0));
        let binary = command(&mesh.configure(Some([any; 3]), ""));
        let mut inside = Command::new("ip");
        inside
            .args(["netns", "exec", &self.relay])
            .arg(binary.get_program());
        inside.args(binary.get_args());
        Relay::start(inside)
    }

    /// Runs `test` on a thread whose sockets are on the nodes' side.
    fn on_the_nodes_side<T>(&self, test: T) -> T::Output
    where
        T: Future<Output: Send> + Send,
    {
        let namespace = File::open(format!("/run/netns/{}", self.nodes)).unwrap();
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), network).unwrap();
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build();
                runtime.unwrap().block_on(test)
            });
            thread.join().unwrap()
        })
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in [&self.relay, &self.nodes] {
            Command::new("ip")
                .args(["netns", "del", name])
                .status()
                .ok(); // Best effort.
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "ip {arguments:?} (needs root): {error}"
    );
}

async fn exchange(mesh: &Mesh, relay: &Relay, transport: Transport) {
    let mut a = Node::connect(mesh, relay, 1, transport).await;
    let mut b = Node::connect(mesh, relay, 2, transport).await;
    // Long enough for MTU discovery to have made up its mind in between.
    for n in 0..200 {
        let packet = vec![n; 1312];
        a.send(&b, &packet);
        assert_eq!(b.data().await, (a.id, packet.clone()));
        b.send(&a, &packet);
        assert_eq!(a.data().await, (b.id, packet));
    }
}

#[test]
fn full_size_packets_pass_where_quic_datagrams_are_too_small_for_them() {
    let mesh = Mesh::new();
    let namespaces = Namespaces::with_mtu(1300);
    let relay = namespaces.relay(&mesh);
    namespaces.on_the_nodes_side(exchange(&mesh, &relay, Quic));
    assert_eq!(counter(&relay.stop(), "queue_dropped_frames"), 0);
}

#[test]
fn full_size_packets_pass_on_ethernet() {
    let mesh = Mesh::new();
    let namespaces = Namespaces::with_mtu(1500);
    let relay = namespaces.relay(&mesh);
    namespaces.on_the_nodes_side(exchange(&mesh, &relay, Quic));
    assert_eq!(counter(&relay.stop(), "queue_dropped_frames"), 0);
}
