//! What the control socket says and takes.

use std::{fmt::Write as _, net::UdpSocket, os::unix::net::UnixStream, time::Instant};

use crate::harness::{Device, Keys, Lab, Program, ask, socket_path, wg};

fn device() -> (Lab, Device) {
    let lab = Lab::new();
    let device = Device::start(&lab, 0, Program::MeshTunnel);
    (lab, device)
}

/// What the kernel's netns.sh asks of keys, and more.
#[test]
fn settings_are_as_wg_sets_them() {
    let (_lab, device) = device();
    let (one, two) = (Keys::new(), Keys::new());
    let psk = wg("genpsk", "").unwrap();
    assert_eq!(device.show("private-key"), "(none)");
    device.set_with("private-key /dev/stdin", &one.private);
    assert_eq!(device.show("private-key"), one.private);
    assert_eq!(device.show("public-key"), one.public);
    device.set_with(
        &format!("peer {} preshared-key /dev/stdin", two.public),
        &psk,
    );
    assert_eq!(
        device.show("preshared-keys"),
        format!("{}\t{psk}", two.public)
    );
    device.set(&format!(
        "private-key /dev/null peer {} preshared-key /dev/null",
        two.public
    ));
    assert_eq!(device.show("private-key"), "(none)");
    assert_eq!(
        device.show("preshared-keys"),
        format!("{}\t(none)", two.public)
    );
    // Becoming one's own peer, and not becoming it.
    device.set_with("private-key /dev/stdin", &two.private);
    assert_eq!(device.show("public-key"), two.public);
    assert_eq!(device.show("peers"), "");
    device.set(&format!("peer {}", two.public));
    assert_eq!(device.show("peers"), "");
    // A key is clamped, as the kernel does.
    let unclamped = format!("/{}", &one.private[1..]);
    device.set_with("private-key /dev/stdin", &unclamped);
    assert_eq!(
        device.show("private-key"),
        format!("+{}", &one.private[1..])
    );

    device.set(&format!(
        "listen-port 12345 fwmark 0x10 peer {} endpoint [2001:db8::1]:99 persistent-keepalive 25 \
         allowed-ips 10.0.0.0/8,fd00::/64,192.168.7.7",
        two.public
    ));
    assert_eq!(device.show("listen-port"), "12345");
    assert_eq!(device.show("fwmark"), "0x10");
    assert_eq!(
        device.show("endpoints"),
        format!("{}\t[2001:db8::1]:99", two.public)
    );
    assert_eq!(
        device.show("persistent-keepalive"),
        format!("{}\t25", two.public)
    );
    assert_eq!(
        device.show("allowed-ips"),
        format!("{}\t10.0.0.0/8 192.168.7.7/32 fd00::/64", two.public)
    );
    assert_eq!(
        device.show("latest-handshakes"),
        format!("{}\t0", two.public)
    );
    device.set(&format!(
        "fwmark 0 peer {} persistent-keepalive off",
        two.public
    ));
    assert_eq!(device.show("fwmark"), "off");
    assert_eq!(
        device.show("persistent-keepalive"),
        format!("{}\toff", two.public)
    );
    // Allowed IPs move.
    let three = Keys::new();
    device.set(&format!("peer {} allowed-ips 10.0.0.0/8", three.public));
    assert_eq!(
        device.show("allowed-ips"),
        format!(
            "{}\t192.168.7.7/32 fd00::/64\n{}\t10.0.0.0/8",
            two.public, three.public
        )
    );
    device.set(&format!("peer {} remove", two.public));
    assert_eq!(device.show("peers"), three.public);
    assert!(wg("show wg-does-not-exist", "").is_err());
}

#[test]
fn configurations_are_set_added_synchronised_and_shown() {
    let (_lab, device) = device();
    let (own, one, two) = (Keys::new(), Keys::new(), Keys::new());
    let interface = format!(
        "[Interface]\nListenPort = 4711\nFwMark = 0x7\nPrivateKey = {}\n",
        own.private
    );
    let peer = |keys: &Keys, net: &str| {
        format!(
            "\n[Peer]\nPublicKey = {}\nAllowedIPs = {net}\nEndpoint = 192.0.2.1:5\nPersistentKeepalive = 9\n",
            keys.public
        )
    };
    device.conf("setconf", &(interface.clone() + &peer(&one, "10.0.0.0/8")));
    device.conf("addconf", &peer(&two, "fd00::/8"));
    let whole = interface.clone() + &peer(&one, "10.0.0.0/8") + &peer(&two, "fd00::/8");
    let shown = || wg(&format!("showconf {}", device.name), "").unwrap();
    assert_eq!(shown(), whole.trim_end());
    // What it shows makes it what it is.
    device.conf("setconf", &shown());
    assert_eq!(shown(), whole.trim_end());
    let less = interface + &peer(&two, "fd00::/8");
    device.conf("syncconf", &less);
    assert_eq!(shown(), less.trim_end());
}

/// As netns.sh: so much that one message of the kernel would not hold it.
#[test]
fn many_allowed_ips_are_kept() {
    let (_lab, device) = device();
    let mut text = format!("[Interface]\nPrivateKey={}\n", Keys::new().private);
    writeln!(text, "[Peer]\nPublicKey={}", Keys::new().public).unwrap();
    for a in 1..256 {
        for b in 0..256 {
            writeln!(text, "AllowedIPs={a}.{b}.0.0/16,{a:x}::{b:x}/128").unwrap();
        }
    }
    let started = Instant::now();
    device.conf("setconf", &text);
    assert_eq!(
        device.show("allowed-ips").split_whitespace().count(),
        255 * 256 * 2 + 1
    );
    println!("{:?} for 130,560 allowed IPs", started.elapsed());
    let mut text = String::new();
    for a in 1..=40 {
        writeln!(text, "[Peer]\nPublicKey={}", Keys::new().public).unwrap();
        for b in 1..=52 {
            writeln!(text, "AllowedIPs={a}.{b}.0.0/16").unwrap();
        }
    }
    device.conf("setconf", &text);
    let shown = device.show("allowed-ips");
    assert_eq!(shown.lines().count(), 40);
    assert!(
        shown
            .lines()
            .all(|line| line.split_whitespace().count() == 53)
    );
}

#[test]
fn what_is_refused_has_changed_nothing() {
    let (lab, device) = device();
    let key = Keys::new();
    device.set_with("listen-port 4000 private-key /dev/stdin", &key.private);
    let before = device.ask("get=1\n\n");
    let peer = "11".repeat(32);
    for (request, errno) in [
        (
            format!("set=1\nlisten_port=5000\npublic_key={peer}\nallowed_ip=10.0.0.0/99\n\n"),
            22,
        ),
        (format!("set=1\npublic_key={peer}\nunknown=1\n\n"), 22),
        ("set=1\nprivate_key=zz\n\n".to_owned(), 22),
        ("set=1\nlisten_port 5000\n\n".to_owned(), 71),
        ("set=2\nlisten_port=5000\n\n".to_owned(), 71),
        ("get=1\nlisten_port=5000\n\n".to_owned(), 22),
        ("\n".to_owned(), 71),
    ] {
        assert_eq!(
            device.ask(&request),
            format!("errno=-{errno}\n\n"),
            "{request:?}"
        );
    }
    // A port that somebody else has.
    let _taken = lab.on(0, || UdpSocket::bind("0.0.0.0:5000").unwrap());
    let request = format!("set=1\nlisten_port=5000\npublic_key={peer}\n\n");
    assert_eq!(device.ask(&request), "errno=-98\n\n");
    let complaint = wg(&format!("set {} listen-port 5000", device.name), "").unwrap_err();
    assert!(complaint.contains("Address already in use"), "{complaint}");
    assert_eq!(device.ask("get=1\n\n"), before);
}

#[test]
fn one_connection_takes_many_requests() {
    let (_lab, device) = device();
    let mut stream = UnixStream::connect(socket_path(&device.name)).unwrap();
    let peer = "22".repeat(32);
    let add = format!("set=1\npublic_key={peer}\nallowed_ip=10.0.0.0/8\nallowed_ip=fd00::/8\n\n");
    assert_eq!(ask(&mut stream, &add), "errno=0\n\n");
    let remove = format!("set=1\npublic_key={peer}\nupdate_only=true\nallowed_ip=-10.0.0.0/8\n\n");
    assert_eq!(ask(&mut stream, &remove), "errno=0\n\n");
    assert_eq!(ask(&mut stream, "set=1\nnonsense=1\n\n"), "errno=-22\n\n");
    let answer = ask(&mut stream, "get=1\n\n");
    assert!(answer.contains("allowed_ip=fd00::/8\n"), "{answer}");
    assert!(
        !answer.contains("10.0.0.0/8") && answer.ends_with("errno=0\n\n"),
        "{answer}"
    );
}

#[test]
fn a_client_that_does_not_go_on_stops_nobody() {
    let (_lab, device) = device();
    let connect = || UnixStream::connect(socket_path(&device.name)).unwrap();
    let half = "set=1\nlisten_port=77";
    // More than there may be: the first ones are hung up on.
    let slow: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = connect();
            std::io::Write::write_all(&mut stream, half.as_bytes()).unwrap();
            stream
        })
        .collect();
    assert!(device.ask("get=1\n\n").ends_with("errno=0\n\n"));
    // A request without end; the one who sends it is told, or hung up on while it sends.
    let mut endless = connect();
    let lines = "allowed_ip=10.0.0.0/8\n".repeat(1 << 16);
    let refused =
        (0..40).any(|_| std::io::Write::write_all(&mut endless, lines.as_bytes()).is_err());
    assert!(refused, "a request of 60 MB was taken");
    drop(slow);
    assert!(device.ask("get=1\n\n").ends_with("errno=0\n\n"));
    assert_ne!(device.show("listen-port"), "77");
}
