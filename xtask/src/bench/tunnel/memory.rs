//! What one more peer costs a WireGuard device in memory.

use std::{fmt::Write as _, thread, time::Duration};

use anyhow::Result;
use netns_tests::tool;

use super::{install::Tool, peers, world::Ends};

/// Enough that pages and the allocator's own steps do not matter: 1,000 × 4 bytes are a page.
const PEERS: u32 = 1_000;

/// A runtime that starts takes a moment until its memory no longer changes.
const SETTLE: Duration = Duration::from_millis(500);

/// Resident memory for each further peer that is configured, without a session, in KiB.
///
/// # Errors
///
/// If the device does not come up or refuses the configuration.
pub(super) fn per_peer_kib(ends: &Ends, tool: &Tool, words: &[&str]) -> Result<f64> {
    let daemon = peers::wireguard_device(&ends.left, tool, words)?;
    let device = peers::DEVICE;
    let key = ends
        .left
        .write("bench.key", &tool::run("wg", &["genkey"], "")?)?;
    let set = format!("wg set {device} private-key {}", key.display());
    peers::shell(&ends.left, &format!("{set} && ip link set {device} up"))?;
    let mut resident = [0.0; 2];
    for (kib, numbers) in resident.iter_mut().zip([0..1, 1..PEERS + 1]) {
        let config = numbers.map(peer).collect::<String>();
        let config = ends.left.write("peers.conf", &config)?;
        peers::shell(
            &ends.left,
            &format!("wg addconf {device} {}", config.display()),
        )?;
        thread::sleep(SETTLE);
        *kib = daemon.resident_kib()? as f64;
    }
    let [one, all] = resident;
    Ok((all - one) / f64::from(PEERS))
}

/// A peer's section. Its key is no one's: 32 bytes, written as 43 characters and `=`.
fn peer(number: u32) -> String {
    let [_, _, high, low] = number.to_be_bytes();
    let mut section = "[Peer]\n".to_owned();
    writeln!(section, "PublicKey = {number:0>42}A=").ok();
    writeln!(section, "AllowedIPs = 10.78.{high}.{low}/32").ok();
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_keys_and_addresses_of_their_own() {
        let section = peer(259);
        let key = section
            .lines()
            .find_map(|line| line.strip_prefix("PublicKey = "));
        assert_eq!(key.map(str::len), Some(44));
        assert!(
            section.ends_with("AllowedIPs = 10.78.1.3/32\n"),
            "{section}"
        );
        assert_ne!(peer(1), peer(2));
    }
}
