//! `mesh-tunnel [-f | --foreground] INTERFACE`: the packet path as a plain WireGuard device, with
//! the control socket that `wg` and `wg-quick` speak to (<https://www.wireguard.com/xplatform/>).
//!
//! **Invariant:** what a device shall be is decided in `device::config`, which touches nothing;
//! a request that is refused has changed nothing.

#![forbid(unsafe_code)]

mod device;

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
    rc::Rc,
};

use anyhow::{Context as _, Result, bail};
use device::{
    Device,
    control::ControlSocket,
    running::{MTU_BYTES, Running},
};
use mesh_linux::netlink::{Changes, Netlink};
use rustix::{process::setsid, stdio};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::LocalSet,
};
use tracing::level_filters::LevelFilter;

const USAGE: &str = "usage: mesh-tunnel [-f | --foreground] INTERFACE

Makes the WireGuard interface INTERFACE, to be configured by `wg` and `ip`, and goes to the
background when it can be.

environment:
  LOG_LEVEL=silent|error|warn|info|debug|verbose   (default: error)
  WG_PROCESS_FOREGROUND=1                          as -f";

/// Bad arguments (`EX_USAGE`, sysexits.h).
const EXIT_USAGE: u8 = 64;

/// How the program calls itself to be the one in the background.
const BACKGROUND: &str = "--in-background";

/// What that one says when it can be configured.
const READY: &str = "ready\n";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let told = env::var("WG_PROCESS_FOREGROUND").is_ok_and(|value| value == "1");
    let result = match *arguments {
        ["-h" | "--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["-V" | "--version"] => {
            println!("mesh-tunnel {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["-f" | "--foreground", interface] => run(interface, || Ok(())),
        [BACKGROUND, interface] => run(interface, let_go),
        [interface] if told && !interface.starts_with('-') => run(interface, || Ok(())),
        [interface] if !interface.starts_with('-') => start_in_background(interface),
        _ => {
            eprintln!("{USAGE}");
            return EXIT_USAGE.into();
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("Error: mesh-tunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program again and waits until it can be configured, or has said why not.
fn start_in_background(interface: &str) -> Result<ExitCode> {
    let program = env::current_exe().context("cannot find this program")?;
    let mut child = Command::new(program)
        .args([BACKGROUND, interface])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start this program in the background")?;
    let mut said = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_string(&mut said)
            .context("cannot hear from the background")?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().context("cannot wait for the background")?;
    if status.code().is_none() {
        bail!("the program in the background ended: {status}");
    }
    // It has said why.
    Ok(ExitCode::FAILURE)
}

/// Leaves the terminal, and lets the one who started this program go on.
fn let_go() -> io::Result<()> {
    setsid()?;
    io::stdout().write_all(READY.as_bytes())?;
    io::stdout().flush()?;
    let nothing = fs::File::options().write(true).open("/dev/null")?;
    stdio::dup2_stdout(&nothing)?;
    if env::var_os("LOG_LEVEL").is_none() {
        // A shell that collects our output would wait for it.
        stdio::dup2_stderr(&nothing)?;
    }
    Ok(())
}

/// Is the device until it is told to end, or cannot be any more.
fn run(interface: &str, ready: impl FnOnce() -> io::Result<()>) -> Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_max_level(log_level())
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    LocalSet::new().block_on(&runtime, live(interface, ready))?;
    Ok(ExitCode::SUCCESS)
}

fn log_level() -> LevelFilter {
    match env::var("LOG_LEVEL").as_deref() {
        Ok("silent") => LevelFilter::OFF,
        Ok("warn") => LevelFilter::WARN,
        Ok("info") => LevelFilter::INFO,
        Ok("debug" | "verbose") => LevelFilter::DEBUG,
        Ok(_) | Err(_) => LevelFilter::ERROR,
    }
}

async fn live(interface: &str, ready: impl FnOnce() -> io::Result<()>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot hear SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot hear SIGINT")?;
    ControlSocket::clear_place(interface)?;
    let (broken, mut is_broken) = mpsc::channel(1);
    let changes = Changes::listen().context("cannot listen to the kernel (netlink)")?;
    let netlink = Netlink::connect().context("cannot talk to the kernel (netlink)")?;
    let running = Running::start(interface, broken)?;
    let link = running.tun().index();
    netlink.set_link_mtu(link, MTU_BYTES.into()).await?;
    let device = Rc::new(Device::new(running, netlink));
    let socket = ControlSocket::bind(interface)?;
    ready().context("cannot go to the background")?;
    tracing::info!("{interface} can be configured");
    let why = tokio::select! {
        _ = terminate.recv() => "SIGTERM".to_owned(),
        _ = interrupt.recv() => "SIGINT".to_owned(),
        reason = is_broken.recv() => reason.unwrap_or_default(),
        () = socket.removed() => "the control socket was removed".to_owned(),
        () = socket.serve(&device) => String::new(),
        failed = device.follow(changes) => {
            match failed.context("cannot see whether the interface is up")? {}
        }
    };
    tracing::info!("{interface} ends: {why}");
    // A successor waits for the socket to go, and then finds the port free too.
    device.stop();
    drop(socket);
    Ok(())
}
