//! Bad input and bad luck.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
};

use mesh_api::admin::CreateTokenRequest;

use crate::lab::{Lab, run_to_end, write_config};

#[tokio::test]
async fn garbage_to_the_port_does_no_harm() {
    let lab = Lab::start(&[]);
    let garbage: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 100_000],
        vec![0xff; 5],
        // A TLS record that promises 16 KiB and does not come.
        vec![0x16, 0x03, 0x01, 0x40, 0x00, 0x01],
        Vec::new(),
    ];
    let mut open = Vec::new();
    for round in 0..20 {
        for bytes in &garbage {
            let mut stream = TcpStream::connect(lab.address).unwrap();
            // It may be cut off while writing.
            stream.write_all(bytes).ok();
            if round < 10 {
                open.push(stream);
            }
        }
    }
    lab.node("edge-a1", 1).await;
    assert_eq!(lab.status().await.nodes, 1);
}

#[test]
fn a_port_in_use_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("manifests")).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    write_config(folder.path(), address, "");
    let (code, said) = run_to_end(folder.path());
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(&format!("cannot listen on {address}")),
        "{said}"
    );
    assert!(said.contains("Address already in use"), "{said}");
}

#[test]
fn a_store_that_is_no_database_is_named_once_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("manifests")).unwrap();
    fs::create_dir(folder.path().join("state")).unwrap();
    let store = folder.path().join("state/controller.redb");
    write_config(folder.path(), ([127, 0, 0, 1], 0).into(), "");
    for length in [1, 100, 20_000] {
        fs::write(&store, vec![b'x'; length]).unwrap();
        let (code, said) = run_to_end(folder.path());
        assert_eq!(code, Some(1), "{length}: {said}");
        let (said, all) = (said.lines().last().unwrap(), said.as_str());
        assert_eq!(said.matches("is damaged (").count(), 1, "{length}: {all}");
        for part in [store.to_str().unwrap(), "docs/howto/backup.md"] {
            assert!(said.contains(part), "{length}: {part}: {all}");
        }
        assert_eq!(fs::read(&store).unwrap().len(), length);
    }
}

#[test]
fn a_secret_that_others_may_read_is_said_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("manifests")).unwrap();
    let password = folder.path().join("password");
    fs::write(&password, "x").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let etcd = format!(
        "[etcd]\nendpoints = [\"127.0.0.1:1\"]\nca_file = \"none\"\nusername = \"u\"\npassword_file = {password:?}\n"
    );
    write_config(folder.path(), taken.local_addr().unwrap(), &etcd);
    let advice = format!("chmod 600 {}", password.display());
    for (mode, warned) in [(0o644, true), (0o640, true), (0o600, false)] {
        fs::set_permissions(&password, fs::Permissions::from_mode(mode)).unwrap();
        let (_, said) = run_to_end(folder.path());
        let line = said.lines().find(|line| line.contains(&advice));
        assert_eq!(line.is_some(), warned, "{mode:o}: {said}");
        assert!(line.is_none_or(|line| line.contains("WARN")), "{said}");
    }
}

#[test]
fn a_wrong_configuration_exits_with_64_and_names_file_line_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    write_config(folder.path(), any, "manifest = \"x\"\n");
    let (code, said) = run_to_end(folder.path());
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("controller.toml"), "{said}");
    assert!(
        said.contains("line 7") && said.contains("unknown field `manifest`"),
        "{said}"
    );
    assert!(
        said.contains("`mesh_name`, `listen`, `state_dir`, `manifests`, `kubernetes`"),
        "{said}"
    );

    write_config(folder.path(), any, "");
    let (code, said) = run_to_end(folder.path());
    assert_eq!(code, Some(64), "{said}");
    assert!(
        said.contains("manifests: ") && said.contains("is not a folder"),
        "{said}"
    );
}

#[tokio::test]
async fn one_store_has_one_controller_and_one_mesh() {
    let mut lab = Lab::start(&[]);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let second = tempfile::tempdir().unwrap();
    fs::create_dir(second.path().join("manifests")).unwrap();
    write_config(second.path(), any, "");
    std::os::unix::fs::symlink(lab.path("state"), second.path().join("state")).unwrap();
    let (code, said) = run_to_end(second.path());
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("another controller uses this store"),
        "{said}"
    );

    let mode = |name: &str| fs::metadata(lab.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode("state"), mode("state/controller.redb")),
        (0o700, 0o600)
    );
    assert_eq!(mode("admin.sock"), 0o600);

    assert!(lab.stop().success());
    assert!(!lab.path("admin.sock").exists());
    let config = second.path().join("controller.toml");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("\"demo\"", "\"other\"");
    fs::write(&config, text).unwrap();
    let (_, said) = run_to_end(second.path());
    assert!(
        said.contains("belongs to mesh demo, but mesh_name is other"),
        "{said}"
    );
}

#[tokio::test]
async fn a_live_admin_socket_is_not_taken_and_a_dead_one_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("manifests")).unwrap();
    write_config(folder.path(), SocketAddr::from(([127, 0, 0, 1], 0)), "");
    let live = std::os::unix::net::UnixListener::bind(folder.path().join("admin.sock")).unwrap();
    let (code, said) = run_to_end(folder.path());
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("another process serves this socket already"),
        "{said}"
    );
    drop(live);
    let lab = Lab::start_in(folder, &[]);
    assert_eq!(lab.status().await.trust_domain, "demo");
}

const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.96.0.1}\n";

#[tokio::test]
async fn a_full_disk_changes_nothing_and_is_got_over() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    fs::create_dir_all(&state).unwrap();
    fs::create_dir(folder.path().join("manifests")).unwrap();
    write_config(folder.path(), SocketAddr::from(([127, 0, 0, 1], 0)), "");
    // Its own mount namespace: the small disk is gone with the process.
    let mount = format!(
        "mount -t tmpfs -o size=6m,mode=700 none {} && exec \"$@\"",
        state.display()
    );
    let mut lab = Lab::start_in(folder, &["unshare", "--mount", "sh", "-c", &mount, "sh"]);
    let credentials = lab.node("edge-a1", 1).await;
    let (mut agent, _) = lab.sync(&credentials, None).await.unwrap();

    let filler = format!("/proc/{}/root{}/filler", lab.pid(), state.display());
    let mut file = fs::File::create(&filler).unwrap();
    let full = (0..7).find_map(|_| file.write_all(&vec![1; 1 << 20]).err());
    assert!(full.is_some());
    let text = "x".repeat(200);
    let mut refused = None;
    for _ in 0..200 {
        let request = CreateTokenRequest {
            description: text.clone(),
            ..Default::default()
        };
        refused = lab.admin().await.create_token(request).await.err();
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("the disk is full");
    assert!(
        refused.message().contains("No space left on device"),
        "{refused}"
    );
    assert!(lab.is_running());
    assert_eq!(lab.status().await.nodes, 1);

    drop(file);
    fs::remove_file(&filler).unwrap();
    lab.write_manifest("a.yaml", SERVICE);
    let delta = agent.next().await.unwrap();
    assert_eq!(delta.set.len(), 1);
    lab.token(CreateTokenRequest::default()).await;
    assert!(lab.status().await.problems.is_empty());
}
