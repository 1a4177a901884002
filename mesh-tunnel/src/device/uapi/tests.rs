use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};

use proptest::{option, prelude::*};

use super::*;

fn no_links(_: &str) -> Option<u32> {
    None
}

fn set(lines: &str) -> Result<Change, Refused> {
    match parse(format!("set=1\n{lines}\n").as_bytes(), no_links)? {
        Request::Set(change) => Ok(change),
        Request::Get => panic!("`set` is not `get`"),
    }
}

/// The request that asks for `change`, as `wg` would write it.
fn request(change: &Change) -> String {
    let mut text = "set=1\n".to_owned();
    let mut line = |key: &str, value: String| writeln!(text, "{key}={value}").unwrap();
    let secret = |key: &Option<Secret>| hex::encode(key.as_ref().map_or(&[0; 32], Secret::bytes));
    if let Some(key) = &change.private_key {
        line("private_key", secret(key));
    }
    if let Some(port) = change.listen_port {
        line("listen_port", port.to_string());
    }
    if let Some(mark) = change.fwmark {
        line("fwmark", mark.to_string());
    }
    if change.replace_peers {
        line("replace_peers", "true".to_owned());
    }
    for peer in &change.peers {
        line("public_key", hex::encode(peer.public_key.0));
        if peer.remove {
            line("remove", "true".to_owned());
        }
        if peer.update_only {
            line("update_only", "true".to_owned());
        }
        if let Some(key) = &peer.preshared_key {
            line("preshared_key", secret(key));
        }
        if let Some(endpoint) = peer.endpoint {
            line("endpoint", endpoint.to_string());
        }
        if let Some(seconds) = peer.keepalive_s {
            line("persistent_keepalive_interval", seconds.to_string());
        }
        if peer.replace_allowed_ips {
            line("replace_allowed_ips", "true".to_owned());
        }
        for allowed_ip in &peer.allowed_ips {
            line(
                "allowed_ip",
                match allowed_ip {
                    AllowedIp::Add(net) => net.to_string(),
                    AllowedIp::Remove(net) => format!("-{net}"),
                },
            );
        }
    }
    text + "\n"
}

fn secret() -> impl Strategy<Value = Option<Secret>> {
    option::of(any::<[u8; 32]>()).prop_map(|bytes| Secret::new(Zeroizing::new(bytes?)))
}

fn net() -> impl Strategy<Value = IpNet> {
    // Few, so that peers take them from one another.
    (any::<bool>(), 0_u8..4, 0_u8..=32).prop_map(|(v6, n, length)| {
        let ip = if v6 {
            IpAddr::from(Ipv6Addr::new(0xfd00 + u16::from(n), 0, 0, 0, 0, 0, 0, 1))
        } else {
            IpAddr::from(Ipv4Addr::new(10 + n, 0, 0, 1))
        };
        IpNet::new(ip, length).unwrap().trunc()
    })
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        any::<([u8; 4], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port))),
        any::<([u8; 16], u16, u32)>().prop_map(|(ip, port, zone)| SocketAddrV6::new(
            ip.into(),
            port,
            0,
            zone
        )
        .into()),
    ]
}

prop_compose! {
    fn peer_change()(
        key in 1_u8..6,
        remove in prop::bool::weighted(0.1),
        update_only in prop::bool::weighted(0.1),
        preshared_key in option::of(secret()),
        endpoint in option::of(endpoint()),
        keepalive_s in option::of(any::<u16>()),
        replace_allowed_ips: bool,
        nets in prop::collection::vec((any::<bool>(), net()), 0..6),
    ) -> PeerChange {
        let allowed = nets.into_iter().map(|(add, net)| {
            if add { AllowedIp::Add(net) } else { AllowedIp::Remove(net) }
        });
        PeerChange {
            public_key: NodeId([key; 32]),
            remove,
            update_only,
            preshared_key,
            endpoint,
            keepalive_s,
            replace_allowed_ips,
            allowed_ips: allowed.collect(),
        }
    }
}

prop_compose! {
    pub(crate) fn change()(
        private_key in option::of(secret()),
        listen_port in option::of(any::<u16>()),
        fwmark in option::of(any::<u32>()),
        replace_peers in prop::bool::weighted(0.2),
        peers in prop::collection::vec(peer_change(), 0..6),
    ) -> Change {
        Change {
            private_key: private_key.map(|key| key.map(Secret::clamped)),
            listen_port,
            fwmark,
            replace_peers,
            peers,
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(change in change()) {
        let text = request(&change);
        prop_assert_eq!(parse(text.as_bytes(), no_links), Ok(Request::Set(change)));
    }

    #[test]
    fn any_bytes_are_a_request_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        begun: bool,
    ) {
        let request = [if begun { &b"set=1\n"[..] } else { b"" }, &bytes].concat();
        // That it comes back at all.
        let _either = parse(&request, no_links);
    }

    #[test]
    fn any_lines_are_a_request_or_refused(
        lines in prop::collection::vec(
            ("(private_key|listen_port|fwmark|public_key|endpoint|allowed_ip|preshared_key|remove|x)",
             "([0-9a-f]{64}|[0-9]{1,6}|true|\\[?[0-9a-f:.%/]{0,20}\\]?:?[0-9]{0,6}|.{0,10})"),
            0..8,
        ),
    ) {
        let mut text = "set=1\n".to_owned();
        for (key, value) in lines {
            writeln!(text, "{key}={value}").unwrap();
        }
        let _either = parse(text.as_bytes(), |name| name.len().try_into().ok());
    }

    /// Whatever a device was told: another that is told what the first one says is the same.
    #[test]
    fn an_answer_describes_the_device(changes in prop::collection::vec(change(), 1..4)) {
        let mut device = Config::default();
        for change in &changes {
            device = device.changed(change).unwrap();
        }
        let answer = reply_to_get(&device, &HashMap::new());
        let told: Vec<_> = answer
            .lines()
            .filter(|line| {
                !["errno", "last_handshake", "tx_bytes", "rx_bytes"]
                    .iter()
                    .any(|key| line.starts_with(key))
            })
            .collect();
        let copy = Config::default().changed(&set(&(told.join("\n") + "\n")).unwrap()).unwrap();
        prop_assert_eq!(reply_to_get(&copy, &HashMap::new()), answer);
    }
}

#[test]
fn an_answer_is_as_wg_reads_it() {
    let change = set(concat!(
        "private_key=e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a\n",
        "listen_port=12912\n",
        "public_key=b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33\n",
        "preshared_key=188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52\n",
        "allowed_ip=192.168.4.4/32\n",
        "endpoint=[abcd:23::33%2]:51820\n",
    ))
    .unwrap();
    let config = Config::default().changed(&change).unwrap();
    let peer = change.peers[0].public_key;
    let live = Live {
        last_handshake: Duration::new(1_700_000_000, 5),
        sent_bytes: 38_333,
        received_bytes: 2_224,
    };
    assert_eq!(
        *reply_to_get(&config, &[(peer, live)].into()),
        concat!(
            "private_key=e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a\n",
            "listen_port=12912\n",
            "public_key=b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33\n",
            "preshared_key=188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52\n",
            "protocol_version=1\n",
            "endpoint=[abcd:23::33%2]:51820\n",
            "last_handshake_time_sec=1700000000\n",
            "last_handshake_time_nsec=5\n",
            "tx_bytes=38333\n",
            "rx_bytes=2224\n",
            "persistent_keepalive_interval=0\n",
            "allowed_ip=192.168.4.4/32\n",
            "errno=0\n\n",
        )
    );
    let nobody = reply_to_get(&Config::default(), &HashMap::new());
    assert_eq!(*nobody, "errno=0\n\n");
}

#[test]
fn requests_that_are_refused_say_why() {
    let refused = |text: &str| parse(text.as_bytes(), no_links).unwrap_err();
    let public_key = format!("set=1\npublic_key={}\n", "11".repeat(32));
    for (text, errno, word) in [
        ("", Errno::PROTO, "empty"),
        ("\n", Errno::PROTO, "empty"),
        ("get=2\n\n", Errno::PROTO, "line 1"),
        ("get=1\nlisten_port=1\n\n", Errno::INVAL, "line 2"),
        ("set=1\nlisten_port\n\n", Errno::PROTO, "line 2"),
        ("set=1\nlisten_port=65536\n\n", Errno::INVAL, "not a port"),
        ("set=1\nfwmark=0x10\n\n", Errno::INVAL, "fwmark"),
        ("set=1\nreplace_peers=false\n\n", Errno::INVAL, "true"),
        (
            "set=1\nendpoint=1.2.3.4:5\n\n",
            Errno::INVAL,
            "not a key of the device",
        ),
        ("set=1\npublic_key=11\n\n", Errno::INVAL, "64 hexadecimal"),
        (
            &format!("{public_key}listen_port=1\n"),
            Errno::INVAL,
            "line 3",
        ),
        (
            &format!("{public_key}endpoint=example.org:1\n"),
            Errno::INVAL,
            "192.0.2.1:51820",
        ),
        (
            &format!("{public_key}endpoint=[fe80::1%eth9]:1\n"),
            Errno::INVAL,
            "eth9",
        ),
        (
            &format!("{public_key}allowed_ip=10.0.0.0/33\n"),
            Errno::INVAL,
            "prefix",
        ),
        (
            &format!("{public_key}allowed_ip=10.0.0.0\n"),
            Errno::INVAL,
            "prefix",
        ),
        (
            &format!("{public_key}protocol_version=2\n"),
            Errno::INVAL,
            "version 1",
        ),
        (
            &format!("{public_key}persistent_keepalive_interval=-1\n"),
            Errno::INVAL,
            "65535",
        ),
    ] {
        let refused = refused(text);
        assert_eq!(refused.errno, errno, "{text:?}");
        assert!(refused.what.contains(word), "{text:?}: {refused}");
    }
    let secret = refused("set=1\nprivate_key=abcdef\n\n");
    assert!(!secret.what.contains("abcdef"), "{secret}");
    assert!(
        refused(&format!("set=1\nx={}\n", "y".repeat(9_999)))
            .what
            .len()
            < 200
    );
    assert_eq!(
        parse(&[0xff, 0xfe], no_links).unwrap_err().errno,
        Errno::PROTO
    );
    assert_eq!(reply_to_set(Err(Errno::ADDRINUSE)), "errno=-98\n\n");
}

#[test]
fn a_link_local_endpoint_may_name_its_interface() {
    let text = format!(
        "set=1\npublic_key={}\nendpoint=[fe80::1%eth7]:51820\n\n",
        "22".repeat(32)
    );
    let request = parse(text.as_bytes(), |name| (name == "eth7").then_some(7)).unwrap();
    let Request::Set(change) = request else {
        panic!("`set` is not `get`");
    };
    assert_eq!(
        change.peers[0].endpoint,
        Some("[fe80::1%7]:51820".parse().unwrap())
    );
}

#[test]
fn keys_are_never_shown() {
    let change = set(&format!(
        "private_key={0}\npublic_key={1}\npreshared_key={0}\n",
        "a7".repeat(32),
        "11".repeat(32),
    ))
    .unwrap();
    let shown = format!("{change:?}");
    assert!(!shown.contains("167") && !shown.contains("a7"), "{shown}");
}
