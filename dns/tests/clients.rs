//! What resolvers and forwarders of others make of the answers: glibc, musl in a root of busybox, unbound, systemd-resolved.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail loudly, and its helpers too"
)]

mod common;

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};

use common::{
    add_big_service,
    running::{LOOPBACK, Running, SOON, start, text},
    snapshot, view,
};
use mesh_core::services::View;
use mesh_dns::{
    client,
    server::{DnsConfig, DnsServer},
};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// A server at port 53, the only one that libraries ask. Loopback addresses are all local; this one is this test's.
async fn at_port_53(number: u8, view: View) -> (DnsServer, String) {
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = SocketAddr::from(([127, 64 + number, high, low.max(1)], 53));
    let config = DnsConfig {
        listen: vec![address],
        ..DnsConfig::default()
    };
    let view = Arc::new(view);
    let view = move || Some(Arc::clone(&view));
    let server = DnsServer::start(config, view, || None, |_| None, CancellationToken::new());
    let resolv_conf = format!(
        "nameserver {}\nsearch shop.svc.cluster.local svc.cluster.local\noptions ndots:5\n",
        address.ip()
    );
    (server.await.unwrap(), resolv_conf)
}

fn big_view() -> View {
    let mut snapshot = snapshot();
    add_big_service(&mut snapshot, 300);
    View {
        snapshot: Arc::new(snapshot),
        ..view()
    }
}

async fn output(command: &mut Command) -> Output {
    let output = timeout(SOON, command.output()).await.unwrap();
    output.unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

#[tokio::test]
async fn glibc_resolves_a_short_name_through_its_search_list() {
    let (_server, resolv_conf) = at_port_53(0, view()).await;
    let script = r#"
        set -e
        mount --make-rprivate /
        mount -t tmpfs none /mnt
        printf %s "$RESOLV_CONF" > /mnt/resolv.conf
        mount --bind /mnt/resolv.conf /etc/resolv.conf
        getent ahosts inventory
        getent hosts edge-a2.mesh
        getent hosts 10.43.0.10
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]);
    let output = output(command.env("RESOLV_CONF", resolv_conf)).await;
    let (shown, errors) = (text(&output), String::from_utf8_lossy(&output.stderr));
    for want in [
        "10.43.0.10",
        "fd43::a",
        "edge-a2.mesh",
        "inventory.shop.svc.cluster.local",
    ] {
        assert!(
            shown.contains(want),
            "{want} is missing:\n{shown}\n{errors}"
        );
    }
}

#[tokio::test]
async fn musl_in_a_root_of_busybox_resolves_names_addresses_and_what_does_not_fit_udp() {
    let (_server, resolv_conf) = at_port_53(1, big_view()).await;
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    for folder in ["bin", "etc"] {
        fs::create_dir(path(folder)).unwrap();
    }
    fs::write(path("etc/resolv.conf"), resolv_conf).unwrap();
    fs::copy("/bin/busybox", path("bin/busybox")).expect("busybox (Debian's busybox-static)");
    symlink("busybox", path("bin/sh")).unwrap();
    let mut compile = Command::new("musl-gcc"); // Debian's musl-tools.
    compile
        .args(["-static", "-O", "-o"])
        .arg(path("bin/resolve"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/resolve.c");
    let compiled = output(compile.arg(source)).await;
    assert!(compiled.status.success(), "{compiled:?}");

    let asked =
        "/bin/resolve inventory edge-a2.mesh 10.43.0.10 big missing.shop.svc.cluster.local.";
    let mut command = Command::new("chroot");
    command.arg(root.path()).args(["/bin/sh", "-c", asked]);
    let output = output(&mut command).await;
    let shown = text(&output);
    for want in [
        "inventory 10.43.0.10\n",
        "inventory fd43::a\n",
        "edge-a2.mesh 100.96.0.2\n",
        "10.43.0.10 inventory.shop.svc.cluster.local\n",
        "missing.shop.svc.cluster.local. Name does not resolve\n",
    ] {
        assert!(
            shown.contains(want),
            "{want} is missing:\n{shown}\n{output:?}"
        );
    }
    // Debian's musl 1.2.3 asks over UDP only: what fits has to be of use.
    let big = shown.matches("big 10.2.").count();
    assert!((20..300).contains(&big), "{shown}");
}

/// Who signs the root zone, as Debian's unbound has it: names of ours are signed by nobody.
const ROOT_KEY: &str =
    ". DS 20326 8 2 E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D";

#[tokio::test]
async fn unbound_forwards_to_it_with_random_letters_and_over_tcp() {
    let running = start(&[], Some(big_view())).await;
    let folder = tempfile::tempdir().unwrap();
    let address = free_address().await;
    let config = format!(
        "server:\n interface: {ip}@{port}\n do-daemonize: no\n chroot: \"\"\n username: \"\"\n directory: \"{dir}\"\n \
         pidfile: \"\"\n use-syslog: no\n logfile: \"\"\n do-not-query-localhost: no\n \
         use-caps-for-id: yes\n local-zone: \"10.in-addr.arpa.\" nodefault\n trust-anchor: \"{ROOT_KEY}\"\n \
         domain-insecure: \"cluster.local\"\n domain-insecure: \"mesh\"\n domain-insecure: \"10.in-addr.arpa\"\nremote-control:\n control-enable: no\n\
         forward-zone:\n name: \".\"\n forward-addr: {to}@{to_port}\n",
        ip = address.ip(),
        port = address.port(),
        dir = folder.path().display(),
        to = running.address.ip(),
        to_port = running.address.port(),
    );
    let file = folder.path().join("unbound.conf");
    fs::write(&file, config).unwrap();
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
    let mut command = Command::new("unbound");
    command.arg("-d").arg("-c").arg(file).env("PATH", path);
    command.stderr(Stdio::null()).kill_on_drop(true);
    let _unbound = command.spawn().expect("unbound (Debian's unbound)");
    passes_on(Running { address, ..running }).await;
}

#[tokio::test]
async fn systemd_resolved_forwards_to_it() {
    let running = start(&[], Some(big_view())).await;
    let address = free_address().await;
    let config = format!(
        "[Resolve]\nDNS={}\nFallbackDNS=\nDomains=~cluster.local ~mesh\nLLMNR=no\nMulticastDNS=no\n\
         DNSStubListener=no\nDNSStubListenerExtra={address}\n",
        running.address
    );
    // Neither systemd nor a bus: it needs a user, and a place of its own.
    let script = r#"
        set -e
        mount --make-rprivate /
        mount -t tmpfs none /run
        mkdir -p /run/systemd/resolved.conf.d
        printf %s "$RESOLVED_CONF" > /run/systemd/resolved.conf.d/test.conf
        for file in passwd group; do
            cp /etc/$file /run/$file
            mount --bind /run/$file /etc/$file
        done
        echo 'systemd-resolve:x:64999:64999::/:/bin/false' >> /run/passwd
        echo 'systemd-resolve:x:64999:' >> /run/group
        export LD_LIBRARY_PATH=$(echo "$TOOL"/usr/lib/*/systemd)
        exec "$TOOL"/lib/systemd/systemd-resolved
    "#;
    let tool = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../target/test-tools/systemd-resolved"
    );
    let program = format!("{tool}/lib/systemd/systemd-resolved");
    assert!(
        fs::exists(&program).unwrap(),
        "{program} is missing: `cargo xtask test` unpacks it"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]);
    command.env("RESOLVED_CONF", config).env("TOOL", tool);
    command.stderr(Stdio::null()).kill_on_drop(true);
    let _resolved = command.spawn().unwrap();
    passes_on(Running { address, ..running }).await;
}

async fn free_address() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind((LOOPBACK, 0)).await;
    listener.unwrap().local_addr().unwrap()
}

/// What asks this forwarder gets what we say, once it is up.
async fn passes_on(forwarder: Running) {
    let name = "inventory.shop.svc.cluster.local";
    let start = Instant::now();
    while client::ask(forwarder.address, name, "A").await.is_err() {
        assert!(start.elapsed() < SOON);
        sleep(Duration::from_millis(20)).await;
    }
    for (question, want) in [
        (name, "10.43.0.10\n"),
        ("db-0.db.shop.svc.cluster.local AAAA", "fd02::1\n"),
        (
            "_http._tcp.inventory.shop.svc.cluster.local SRV",
            "0 100 80 inventory.shop.svc.cluster.local.\n",
        ),
        ("-x 10.43.0.10", "inventory.shop.svc.cluster.local.\n"),
        (
            "shelf.shop.svc.cluster.local",
            "inventory.shop.svc.cluster.local.\n10.43.0.10\n",
        ),
    ] {
        let said = forwarder.dig(&format!("+short {question}")).await;
        assert_eq!(said, want, "{question}");
    }
    let missing = forwarder.dig("missing.shop.svc.cluster.local").await;
    assert!(missing.contains("status: NXDOMAIN"), "{missing}");
    let big = forwarder.dig("+short big.shop.svc.cluster.local").await;
    assert_eq!(big.lines().count(), 300);
}
