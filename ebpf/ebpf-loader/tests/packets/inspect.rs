//! What people are told of programs, their places, and maps.

use std::{collections::BTreeSet, fs, path::Path};

use ebpf_loader::{
    BPFFS, Clients, Frontend, LinkHeader, Pins, Protocol, Services,
    fill::{Fill, FlowCounts},
    inspect::{At, LoadedProgram, maps},
    mapping::Mappings,
    policy::Policy,
};

use crate::{
    bpffs::new_bpffs,
    lan::{Lan, families, index},
};

fn ids(programs: &[LoadedProgram]) -> BTreeSet<u32> {
    let ids = programs.iter().flat_map(|program| &program.map_ids);
    ids.copied().collect()
}

fn fills(services: &Services, policy: &Policy, mappings: &Mappings) -> Vec<Fill> {
    let flows = [services.flow_maps(), policy.flow_maps()].concat();
    let flows = FlowCounts::default().fills(&flows);
    assert_eq!(flows.len(), 13, "{flows:?}");
    [services.fills(), policy.fills(), mappings.fills(), flows].concat()
}

fn of<'a>(programs: &'a [LoadedProgram], name: &str) -> &'a LoadedProgram {
    programs.iter().find(|one| one.name == name).unwrap()
}

#[test]
fn programs_are_told_with_their_places_and_whether_these_last() {
    let mut lan = Lan::new();
    let lan0 = index("lan0");
    assert!(lan.services.detach_interface(lan0));
    new_bpffs();
    let pins = Pins::open(Path::new(BPFFS), lan.cgroup()).unwrap();
    let folder = pins.folder().to_owned();
    let mut services = Services::take_over(lan.cgroup(), Some(pins), true).unwrap();
    let before = services.programs();
    assert!(before.iter().all(|one| one.places.is_empty()));
    services.attach().unwrap();
    services
        .attach_interface(lan0, LinkHeader::Ethernet)
        .unwrap();

    let programs = services.programs();
    let connect = of(&programs, "hf_connect4");
    assert_eq!(connect.hook, "cgroup connect4");
    assert!(connect.id > 0 && connect.tag > 0 && connect.verified_instructions > 0);
    let place = &connect.places[0];
    assert_eq!(place.at, At::Cgroup(lan.cgroup().to_owned()));
    assert!(place.attached && place.pinned == Some(true));
    let requests = of(&programs, "hf_requests");
    assert_eq!(requests.hook, "tcx ingress");
    assert_eq!(requests.places[0].at, At::Interface(lan0));
    assert!(requests.places[0].attached);
    // No interface here has packets that begin with the IP header.
    assert!(of(&programs, "hf_requests_ip").places.is_empty());

    // Somebody cleans up bpffs.
    fs::remove_file(folder.join("links/cgroup_hf_connect4")).unwrap();
    let programs = services.programs();
    assert_eq!(of(&programs, "hf_connect4").places[0].pinned, Some(false));
    assert_eq!(of(&programs, "hf_connect6").places[0].pinned, Some(true));
}

#[test]
fn what_is_in_each_map_is_counted_whatever_its_keys() {
    let mut lan = Lan::new();
    let [family, _] = families();
    let frontend = Frontend {
        clients: Clients::All,
        address: family.service.ip(),
        port: family.service.port(),
        protocol: Protocol::Tcp,
    };
    let backends = vec![family.service, family.service].into();
    lan.services.apply(&[(frontend, backends)].into()).unwrap();
    let policy = Policy::load(None).unwrap();
    let mappings = Mappings::load().unwrap();
    let mut all = ids(&lan.services.programs());
    all.extend(ids(&policy.programs()));
    all.extend(ids(&mappings.programs(index("lan0"))));

    let found = maps(&all, true);
    let entries = |name: &str| found.iter().find(|map| map.name == name).unwrap().entries;
    assert_eq!(entries("hf_frontends"), Some(1));
    assert_eq!(entries("hf_endpoints"), Some(2));
    assert_eq!(entries("hf_pol_flows"), Some(0));
    for fill in fills(&lan.services, &policy, &mappings) {
        let map = found.iter().find(|map| map.name == fill.map);
        let map = map.unwrap_or_else(|| panic!("{fill:?}"));
        let counted = map.entries.unwrap_or(0) as usize;
        // One of devices is always as large as it can be.
        assert!(
            fill.entries == counted || map.kind == "devmap",
            "{fill:?} {map:?}"
        );
        assert!(fill.entries_max > 1 && fill.entries_max <= map.entries_max as usize);
    }
    for map in &found {
        let grows = ["hash", "lru_hash", "lpm_trie", "devmap_hash"].contains(&map.kind);
        let is_counted = grows || map.name == "hf_tracked"; // An array of places that are free or not.
        assert_eq!(map.entries.is_some(), is_counted, "{map:?}");
        assert_ne!(map.kind, "other", "{map:?}");
        // An empty trie takes none.
        assert!(map.bytes.is_some(), "{map:?}");
    }
    let all_bytes: Option<u64> = found.iter().map(|map| map.bytes).sum();
    assert!(all_bytes > Some(1 << 20), "{all_bytes:?}");
    let uncounted = maps(&all, false);
    assert_eq!(uncounted.len(), found.len());
    assert!(uncounted.iter().all(|map| map.entries.is_none()));
}
