//! The table of prefixes against a search through all of them.

#![no_main]

use std::net::IpAddr;

use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use mesh_tunnel::route::RouteTable;
use mesh_wire::id::NodeId;

fuzz_target!(|input: (Vec<(IpAddr, u8, u8)>, Vec<IpAddr>)| {
    let (prefixes, addresses) = input;
    let nets: Vec<_> = prefixes
        .into_iter()
        .filter_map(|(ip, len, node)| Some((IpNet::new(ip, len).ok()?, NodeId([node; 32]))))
        .collect();
    let table: RouteTable = nets.iter().copied().collect();
    for ip in addresses
        .into_iter()
        .chain(nets.iter().map(|(net, _)| net.addr()))
    {
        // Of two with the same prefix the later has it, as with `max_by_key`.
        let found = nets.iter().filter(|(net, _)| net.contains(&ip));
        let expected = found.max_by_key(|(net, _)| net.prefix_len());
        assert_eq!(table.get(ip), expected.map(|(_, node)| node));
    }
});
