use super::*;

#[test]
fn each_kind_has_a_definition_with_the_field_names_that_users_write() {
    let expected = [
        ("communities", "sites"),
        ("externalpeers", "keepaliveSeconds"),
        ("meshconfigs", "overlayIPv4CIDR"),
        ("meshnodes", "overlayIPv4"),
        ("meshpolicies", "audit"),
        ("meshrelays", "quicPort"),
        ("meshservices", "spillOver"),
        ("siteroutes", "gateways"),
    ];
    let definitions = definitions();
    assert_eq!(definitions.len(), expected.len());
    for (definition, (plural, field)) in definitions.iter().zip(expected) {
        let spec = &definition["spec"];
        assert_eq!(spec["names"]["plural"], plural);
        assert_eq!(definition["metadata"]["name"], format!("{plural}.{GROUP}"));
        let scope = if plural == "meshservices" {
            "Namespaced"
        } else {
            "Cluster"
        };
        assert_eq!(spec["scope"], scope);
        let version = &spec["versions"][0];
        let properties = &version["schema"]["openAPIV3Schema"]["properties"];
        let described = &properties["spec"]["properties"][field]["description"];
        assert!(described.is_string(), "{plural}.{field}: {version}");
        assert!(properties["status"]["properties"]["conditions"].is_object());
        assert!(version["subresources"]["status"].is_object());
        assert_eq!(
            format!("{GROUP}/{}", version["name"].as_str().unwrap()),
            API_VERSION
        );
    }
}

/// What an API server refuses (`ValidateCustomResourceDefinition`, structural schemas), or warns of.
#[test]
fn schemas_are_structural_and_say_how_large_everything_may_be() {
    for definition in definitions() {
        let name = definition["metadata"]["name"].to_string();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        check(&name, schema);
        let spec = &schema["properties"]["spec"];
        bounded(&format!("{name}.spec"), spec);
    }
}

#[test]
fn a_config_of_another_name_is_refused_by_the_api_server() {
    let definitions = definitions();
    let schema = &definitions[2]["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let rule = &schema["x-kubernetes-validations"][0]["rule"];
    assert_eq!(rule, "self.metadata.name == 'default'");
}

fn check(path: &str, schema: &Value) {
    let fields = schema.as_object().unwrap();
    let typed = fields.get("type").is_some_and(Value::is_string);
    assert!(typed, "{path} has not one type: {schema}");
    for forbidden in [
        "$ref",
        "anyOf",
        "oneOf",
        "allOf",
        "uniqueItems",
        "definitions",
    ] {
        assert!(!fields.contains_key(forbidden), "{path}: {forbidden}");
    }
    let closed = fields.get("additionalProperties") == Some(&json!(false));
    assert!(!closed, "{path}: additionalProperties: false");
    if let Some(format) = fields.get("format").and_then(Value::as_str) {
        let known = ["int32", "int64", "ipv4", "date-time"];
        assert!(known.contains(&format), "{path}: {format}");
    }
    if let Some(values) = fields.get("enum").and_then(Value::as_array) {
        let nullable = fields.get("nullable") == Some(&json!(true));
        assert_eq!(values.contains(&Value::Null), nullable, "{path}: null");
    }
    for (name, property) in properties(schema) {
        check(&format!("{path}.{name}"), property);
    }
    if let Some(items) = fields.get("items") {
        check(&format!("{path}[]"), items);
    }
    if let Some(values) = fields.get("additionalProperties") {
        check(&format!("{path}{{}}"), values);
    }
}

/// Without limits, an API server estimates the cost of rules below by the longest request.
fn bounded(path: &str, schema: &Value) {
    if schema["type"] == "array" {
        assert!(schema["maxItems"].is_number(), "{path} has no maxItems");
        bounded(&format!("{path}[]"), &schema["items"]);
    }
    if schema["type"] == "string" {
        let bounded = ["maxLength", "enum", "format"];
        let bounded = bounded.iter().any(|limit| !schema[limit].is_null());
        assert!(bounded, "{path} has no maxLength");
    }
    for (name, property) in properties(schema) {
        bounded(&format!("{path}.{name}"), property);
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}
