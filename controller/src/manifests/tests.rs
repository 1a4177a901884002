use std::path::Path;

use super::*;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  ports: [{name: http, port: 80}]
";

#[test]
fn each_problem_names_file_line_document_object_and_field() {
    let cases = [
        (
            "port: 80}]",
            "port: http}]",
            "shop.yaml:1: document 1: Service shop/inventory: spec.ports[0].port: invalid type: string \"http\", expected i32 (line 6, column 30)",
        ),
        (
            "port: 80}]",
            "port: 0}]",
            "spec.ports[0].port: 0 is not a port (1 to 65535)",
        ),
        (
            "ports:",
            "prots:",
            "shop.yaml:1: document 1: Service shop/inventory: spec.prots: unknown field",
        ),
        (
            "name: http",
            "nme: http",
            "spec.ports[0].nme: unknown field",
        ),
        (
            "10.96.0.10",
            "10.96.0.999",
            "spec.clusterIP: \"10.96.0.999\": invalid IP address syntax",
        ),
        (
            "  clusterIP: 10.96.0.10\n",
            "",
            "spec.clusterIP: missing: give an address, or None",
        ),
        (
            "kind: Service",
            "kind: Deployment",
            "kind: Deployment of v1 is not known here",
        ),
        ("kind: Service\n", "", "kind: missing"),
        (
            "name: inventory",
            "nam: inventory",
            "metadata.name: missing",
        ),
        ("metadata: {", "metadata: {{", "shop.yaml:1: document 1: "),
    ];
    for (good, bad, expected) in cases {
        let text = SERVICE.replace(good, bad);
        assert_ne!(text, SERVICE);
        let problems = parse_file("shop.yaml", &text).problems;
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(problems[0].contains(expected), "{bad}: {}", problems[0]);
    }
}

#[test]
fn documents_and_list_items_are_counted_and_one_broken_one_hides_no_other() {
    let item = SERVICE.replace('\n', "\n  ").replace("inventory", "listed");
    let text = format!(
        "# first a comment\n---\n{SERVICE}---\nbroken: [\n---\napiVersion: v1\nkind: List\nitems:\n- {item}\n- apiVersion: v1\n  kind: Pod\n"
    );
    let parsed = parse_file("all.yaml", &text);
    let names: Vec<_> = parsed
        .objects
        .iter()
        .map(|loaded| loaded.id.to_string())
        .collect();
    assert_eq!(names, ["Service shop/inventory", "Service shop/listed"]);
    assert!(
        parsed.problems[0].starts_with("all.yaml:9: document 2: "),
        "{:?}",
        parsed.problems
    );
    let expected = "all.yaml:11: document 3: items[1]: kind: Pod of v1 is not known here";
    assert!(
        parsed.problems[1].starts_with(expected),
        "{:?}",
        parsed.problems
    );
}

#[test]
fn our_own_kinds_name_their_unknown_fields_and_wrong_values() {
    let node = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {name: edge-a1}\nspec: {site: a, prefixes: [192.168.1.0/24]}\n";
    assert_eq!(parse_file("n.yaml", node).problems, Vec::<String>::new());
    let cases = [
        (
            "site: a",
            "sight: a",
            "MeshNode edge-a1: spec.sight: unknown field `sight`",
        ),
        (
            "192.168.1.0/24",
            "192.168.1.0/64",
            "spec.prefixes[0]: \"192.168.1.0/64\"",
        ),
        (
            "site: a",
            "overlayIPv4: fd00::1",
            "spec.overlayIPv4: \"fd00::1\"",
        ),
    ];
    for (good, bad, expected) in cases {
        let problems = parse_file("n.yaml", &node.replace(good, bad)).problems;
        assert!(problems[0].contains(expected), "{bad}: {problems:?}");
    }
}

#[test]
fn a_broken_file_takes_nothing_away_not_even_after_a_restart() {
    let place = tempfile::tempdir().unwrap();
    let other = SERVICE.replace("inventory", "orders");
    write(place.path(), &format!("{SERVICE}---\n{other}"));
    let mut folder = Folder::default();
    let remembered = folder.scan(place.path()).remember;
    let remembered: BTreeMap<_, _> = remembered
        .into_iter()
        .map(|(name, text)| (name, text.unwrap()))
        .collect();
    assert_eq!(
        ports(&folder),
        [("inventory".to_owned(), 80), ("orders".to_owned(), 80)]
    );

    // One is changed, the other broken.
    write(
        place.path(),
        &format!("{}---\n{other}  x: [", SERVICE.replace("80", "81")),
    );
    let expected = [("inventory".to_owned(), 81), ("orders".to_owned(), 80)];
    assert!(folder.scan(place.path()).changed);
    assert_eq!(ports(&folder), expected);
    assert_eq!(folder.objects().1.len(), 1);

    let mut restarted = Folder::restore(&remembered);
    restarted.scan(place.path());
    assert_eq!(ports(&restarted), expected);

    write(place.path(), SERVICE);
    folder.scan(place.path());
    assert_eq!(ports(&folder), [("inventory".to_owned(), 80)]);
    assert_eq!(folder.objects().1, Vec::<String>::new());
}

#[test]
fn the_first_of_two_equal_objects_counts_also_across_files() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), SERVICE);
    fs::write(place.path().join("z.yaml"), SERVICE.replace("80", "99")).unwrap();
    let mut folder = Folder::default();
    folder.scan(place.path());
    assert_eq!(ports(&folder), [("inventory".to_owned(), 80)]);
    let problems = folder.objects().1;
    let expected = "z.yaml:1: document 1: Service shop/inventory: is already at shop.yaml:1: document 1; this one is left out";
    assert_eq!(problems, [expected]);
}

#[test]
fn a_folder_that_vanished_takes_nothing_away() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), SERVICE);
    let mut folder = Folder::default();
    folder.scan(place.path());
    let gone = place.path().join("gone");
    assert!(folder.scan(&gone).changed);
    assert!(!folder.scan(&gone).changed);
    assert_eq!(folder.objects().0.len(), 1);
    assert!(folder.objects().1[0].contains("No such file"));
}

fn write(folder: &Path, text: &str) {
    fs::write(folder.join("shop.yaml"), text).unwrap();
}

fn ports(folder: &Folder) -> Vec<(String, u16)> {
    let objects = folder.objects().0.into_iter();
    let mut ports: Vec<_> = objects
        .filter_map(|loaded| {
            let Object::Service(Some(service)) = &loaded.object else {
                return None;
            };
            Some((service.name.name.clone(), service.ports[0].port))
        })
        .collect();
    ports.sort();
    ports
}
