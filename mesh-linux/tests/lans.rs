//! What else is asked of the kernel, in a namespace that each test makes: the machine's LANs, and the size of TCP's
//! segments. Needs root.

#![expect(clippy::unwrap_used, reason = "tests fail loudly")]

use std::process::Command;

use mesh_linux::{mss, netlink::Netlink, netns};

/// A namespace; gone when dropped, also after a panic.
struct Namespace(String);

impl Namespace {
    fn new(name: &str) -> Self {
        let name = format!("hfl{}-{name}", std::process::id());
        run(&["ip", "netns", "add", &name]);
        Self(name)
    }

    fn ip(&self, words: &str) {
        let words: Vec<_> = words.split(' ').collect();
        run(&[&["ip", "-n", &self.0], words.as_slice()].concat());
    }

    fn on<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&netns::named(&self.0), work).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status()
            .ok();
    }
}

fn run(words: &[&str]) -> String {
    let (program, words) = words.split_first().unwrap();
    let output = Command::new(program).args(words).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_table_of_segment_sizes_is_made_once_and_changed_as_a_whole_and_goes() {
    let namespace = Namespace::new("mss");
    let listed = || {
        run(&[
            "ip",
            "netns",
            "exec",
            &namespace.0,
            "nft",
            "list",
            "ruleset",
        ])
    };
    namespace.on(|| {
        assert!(!mss::remove("hf_test").unwrap());
        assert!(!mss::stands("hf_test", "holdfast0").unwrap());
        assert!(mss::clamp("hf_test", "other0").unwrap());
        assert!(mss::clamp("hf_test", "holdfast0").unwrap());
        assert!(!mss::clamp("hf_test", "holdfast0").unwrap());
        assert!(mss::stands("hf_test", "holdfast0").unwrap());
    });
    let rules = listed();
    for direction in ["iifname", "oifname"] {
        let rule = format!(
            "{direction} \"holdfast0\" tcp flags syn / syn,rst counter packets 0 bytes 0 tcp option maxseg size \
             set rt mtu"
        );
        assert!(rules.contains(&rule), "{rules}");
    }
    assert!(rules.contains("hook forward priority mangle"), "{rules}");
    assert!(!rules.contains("other0"), "{rules}");
    namespace.on(|| assert!(mss::remove("hf_test").unwrap()));
    assert!(!listed().contains("hf_test"));
}

#[test]
fn a_lan_is_an_interface_with_a_carrier_and_addresses_and_has_its_gateways() {
    let namespace = Namespace::new("lans");
    for words in [
        "link set lo up",
        "link add lan0 type veth peer name lan0-end",
        "link add dark0 type veth peer name dark0-end",
        "link set lan0-end up",
        "link set lan0 up",
        "link set dark0 up",
        "addr add 192.168.1.11/24 dev lan0",
        "addr add fd07::11/64 dev lan0 nodad",
        "addr add 10.9.9.9/24 dev dark0",
        "route add default via 192.168.1.1 dev lan0 metric 100",
        "route add default via 192.168.1.2 dev lan0 metric 200",
        "route add 10.1.0.0/16 via 192.168.1.3 dev lan0",
        "route add ::/0 via fe80::1 dev lan0",
    ] {
        namespace.ip(words);
    }
    let lans = namespace.on(|| {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            let netlink = Netlink::connect().unwrap();
            let lans = netlink.lans("").await.unwrap();
            assert!(
                netlink
                    .lans("lan0")
                    .await
                    .unwrap()
                    .iter()
                    .all(|lan| lan.name != "lan0")
            );
            lans
        })
    });
    let lan = lans.iter().find(|lan| lan.name == "lan0").unwrap();
    assert!(lan.multicast);
    for address in ["192.168.1.11/24", "fd07::11/64"] {
        assert!(lan.addresses.contains(&address.parse().unwrap()), "{lan:?}");
    }
    let gateways: Vec<_> = lan.gateways.iter().map(ToString::to_string).collect();
    assert_eq!(gateways, ["192.168.1.1", "192.168.1.2", "fe80::1"]);
    assert!(
        !lans
            .iter()
            .any(|lan| ["dark0", "lo"].contains(&lan.name.as_str())),
        "{lans:?}"
    );
}
