//! What the real server demands of a custom resource's schema: it must be structural.

use serde_json::Value;

use super::{
    cel::Rule,
    cel_cost,
    error::Cause,
    object,
    schema::{Definitions, Schema},
};

/// Every key that a schema may have.
const KNOWN: &[&str] = &[
    "additionalProperties",
    "allOf",
    "anyOf",
    "default",
    "description",
    "enum",
    "example",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "externalDocs",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "nullable",
    "oneOf",
    "pattern",
    "properties",
    "required",
    "title",
    "type",
    "uniqueItems",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
];

/// Keys that the API has and that no structural schema may use.
const FORBIDDEN: &[&str] = &[
    "$ref",
    "$schema",
    "additionalItems",
    "definitions",
    "dependencies",
    "id",
    "patternProperties",
];

/// What members of `allOf` and its kin may not say: they only add limits.
const NOT_IN_JUNCTORS: &[&str] = &[
    "additionalProperties",
    "default",
    "description",
    "nullable",
    "title",
    "type",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields",
];

const TYPES: &[&str] = &["object", "array", "string", "integer", "number", "boolean"];

/// What is wrong with a schema at `path`.
pub(crate) fn check(schema: &Value, path: &str) -> Vec<Cause> {
    let mut check = Check {
        causes: Vec::new(),
        cost: 0.0,
    };
    if object::text(schema, &["type"]) != Some("object") {
        let got = schema.get("type").unwrap_or(&Value::Null);
        let cause = Cause::invalid(format!("{path}.type"), got, "must be object at the root");
        check.causes.push(cause);
    }
    check.root_metadata(schema, path);
    check.schema(schema, path, true, 1.0);
    if check.cost > cel_cost::TOTAL_MAX {
        let why =
            dear("x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema");
        check.forbid(path.to_owned(), &why);
    }
    check.causes
}

struct Check {
    causes: Vec<Cause>,
    /// Of all rules so far.
    cost: f64,
}

fn dear(what: &str) -> String {
    format!(
        "{what} exceeds budget (try simplifying the rule, or adding maxItems, maxProperties, and \
         maxLength where arrays, maps, and strings are declared)"
    )
}

impl Check {
    fn forbid(&mut self, path: String, why: &str) {
        self.causes.push(Cause::forbidden(path, why));
    }

    /// At the root, metadata is the server's: only its name may be limited.
    fn root_metadata(&mut self, schema: &Value, path: &str) {
        let members = object::members(schema, &["properties", "metadata"]);
        for (key, _) in members.filter(|(key, _)| !matches!(key.as_str(), "type" | "properties")) {
            let why = "must not specify anything other than name and generateName, but metadata is \
                       implicitly specified";
            self.forbid(format!("{path}.properties[metadata].{key}"), why);
        }
    }

    /// `correlatable`: an old value can be found for this place. `count`: how often the place can be
    /// in an object.
    fn schema(&mut self, schema: &Value, path: &str, correlatable: bool, count: f64) {
        let Some(map) = schema.as_object() else {
            let why = "must be a schema";
            self.causes.push(Cause::invalid(path, schema, why));
            return;
        };
        for key in map.keys() {
            if FORBIDDEN.contains(&key.as_str()) {
                self.forbid(format!("{path}.{key}"), &format!("{key} is not supported"));
            } else if !KNOWN.contains(&key.as_str()) {
                self.forbid(format!("{path}.{key}"), "unknown field");
            }
        }
        self.types(schema, path);
        self.lists(schema, path);
        let parsed = Schema::parse(schema).unwrap_or_default();
        self.rules(schema, &parsed, path, correlatable, count);
        let inside = count * cel_cost::size(&parsed);
        self.default(schema, path);
        for (name, property) in object::members(schema, &["properties"]) {
            self.schema(
                property,
                &format!("{path}.properties[{name}]"),
                correlatable,
                count,
            );
        }
        if let Some(items) = schema.get("items") {
            let keyed = object::text(schema, &["x-kubernetes-list-type"]) == Some("map");
            let path = format!("{path}.items");
            self.schema(items, &path, correlatable && keyed, inside);
        }
        if let Some(values @ Value::Object(_)) = schema.get("additionalProperties") {
            self.schema(
                values,
                &format!("{path}.additionalProperties"),
                correlatable,
                inside,
            );
        }
        for junctor in ["allOf", "anyOf", "oneOf"] {
            let int_or_string = flag(schema, "x-kubernetes-int-or-string");
            for (index, one) in object::list(schema, &[junctor]).iter().enumerate() {
                let path = format!("{path}.{junctor}[{index}]");
                self.junctor(one, schema, &path, int_or_string);
            }
        }
        if let Some(not) = schema.get("not") {
            self.junctor(not, schema, &format!("{path}.not"), false);
        }
    }

    fn types(&mut self, schema: &Value, path: &str) {
        let preserve = flag(schema, "x-kubernetes-preserve-unknown-fields");
        let int_or_string = flag(schema, "x-kubernetes-int-or-string");
        match object::text(schema, &["type"]) {
            None if preserve || int_or_string => {}
            None => {
                let why = "must not be empty for specified object fields";
                self.causes
                    .push(Cause::required(format!("{path}.type"), why));
            }
            Some(_) if int_or_string => {
                let why = "must be empty if x-kubernetes-int-or-string is true";
                let got = schema.get("type").unwrap_or(&Value::Null);
                let cause = Cause::invalid(format!("{path}.type"), got, why);
                self.causes.push(cause);
            }
            Some(one) if !TYPES.contains(&one) => {
                let cause = Cause::not_supported(format!("{path}.type"), &one.into(), TYPES);
                self.causes.push(cause);
            }
            Some("array") if schema.get("items").is_none() => {
                let why = "must be specified";
                self.causes
                    .push(Cause::required(format!("{path}.items"), why));
            }
            Some("object") => {}
            Some(_) if schema.get("properties").is_some() => {
                self.forbid(format!("{path}.properties"), "only for type object");
            }
            Some(_) => {}
        }
        if schema.get("properties").is_some() && schema.get("additionalProperties").is_some() {
            let why = "additionalProperties and properties are mutual exclusive";
            self.forbid(format!("{path}.additionalProperties"), why);
        }
        if schema.get("additionalProperties") == Some(&Value::Bool(false)) {
            let why = "additionalProperties cannot be set to false";
            self.forbid(format!("{path}.additionalProperties"), why);
        }
        if flag(schema, "uniqueItems") {
            let why =
                "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
            self.forbid(format!("{path}.uniqueItems"), why);
        }
        if flag(schema, "x-kubernetes-embedded-resource")
            && !preserve
            && schema.get("properties").is_none()
        {
            let why = "must not be empty if x-kubernetes-embedded-resource is true without \
                       x-kubernetes-preserve-unknown-fields";
            self.causes
                .push(Cause::required(format!("{path}.properties"), why));
        }
        if let Err(why) = schema
            .get("pattern")
            .and_then(Value::as_str)
            .map_or(Ok(()), |pattern| regex::Regex::new(pattern).map(drop))
        {
            let got = schema.get("pattern").unwrap_or(&Value::Null);
            let why = format!("must be a valid regular expression, but isn't: {why}");
            self.causes
                .push(Cause::invalid(format!("{path}.pattern"), got, &why));
        }
    }

    fn lists(&mut self, schema: &Value, path: &str) {
        let list = object::text(schema, &["x-kubernetes-list-type"]);
        let keys = object::texts(schema, &["x-kubernetes-list-map-keys"]);
        let place = format!("{path}.x-kubernetes-list-type");
        match list {
            None | Some("atomic" | "set" | "map") => {}
            Some(other) => {
                let known = ["atomic", "set", "map"];
                self.causes
                    .push(Cause::not_supported(&place, &other.into(), &known));
            }
        }
        if list.is_some() && object::text(schema, &["type"]) != Some("array") {
            self.forbid(
                place,
                "must be array if x-kubernetes-list-type is specified",
            );
        }
        let keys_place = format!("{path}.x-kubernetes-list-map-keys");
        if list != Some("map") {
            if !keys.is_empty() {
                self.forbid(keys_place, "only for x-kubernetes-list-type map");
            }
            return;
        }
        if keys.is_empty() {
            let why = "must not be empty if x-kubernetes-list-type is map";
            self.causes.push(Cause::required(keys_place, why));
            return;
        }
        let Some(items) = schema.get("items") else {
            return;
        };
        let required = object::texts(items, &["required"]);
        for key in keys {
            match object::at(items, &["properties", key]) {
                None => {
                    let why = "entries must all be names of item properties";
                    self.causes
                        .push(Cause::invalid(&keys_place, &key.into(), why));
                }
                Some(property) if !required.contains(&key) && property.get("default").is_none() => {
                    let place = format!("{path}.items.properties[{key}].default");
                    let why = "this property is in x-kubernetes-list-map-keys, so it must have a \
                               default or be a required property";
                    self.causes.push(Cause::required(place, why));
                }
                Some(_) => {}
            }
        }
    }

    fn rules(
        &mut self,
        schema: &Value,
        parsed: &Schema,
        path: &str,
        correlatable: bool,
        count: f64,
    ) {
        for (index, raw) in object::list(schema, &["x-kubernetes-validations"])
            .iter()
            .enumerate()
        {
            let path = format!("{path}.x-kubernetes-validations[{index}]");
            for (key, _) in object::members(raw, &[]) {
                let known = [
                    "rule",
                    "message",
                    "messageExpression",
                    "reason",
                    "fieldPath",
                    "optionalOldSelf",
                ];
                if !known.contains(&key.as_str()) {
                    self.forbid(format!("{path}.{key}"), "unknown field");
                }
            }
            match Rule::parse(raw).and_then(|rule| rule.fits(parsed).map(|()| rule)) {
                Err(why) => {
                    let rule = raw.get("rule").unwrap_or(&Value::Null);
                    self.causes
                        .push(Cause::invalid(format!("{path}.rule"), rule, &why));
                }
                Ok(rule) if rule.compares() && !correlatable => {
                    let rule = raw.get("rule").unwrap_or(&Value::Null);
                    let why = "oldSelf cannot be used on the uncorrelatable portion of the schema";
                    self.causes
                        .push(Cause::invalid(format!("{path}.rule"), rule, why));
                }
                Ok(rule) => {
                    let cost = rule.cost(parsed) * count;
                    self.cost += cost;
                    if cost > cel_cost::RULE_MAX {
                        let why = dear("estimated rule cost");
                        self.forbid(format!("{path}.rule"), &why);
                    }
                }
            }
        }
    }

    /// A default must be what its schema allows.
    fn default(&mut self, schema: &Value, path: &str) {
        let Some(default) = schema.get("default") else {
            return;
        };
        let Ok(parsed) = Schema::parse(schema) else {
            return; // Said where it is wrong.
        };
        let none = Definitions::new();
        let mut value = default.clone();
        let unknown = parsed.prune(&mut value, &none);
        parsed.fill_in(&mut value, &none);
        let place = format!("{path}.default");
        if !unknown.is_empty() {
            let why = "must not have unknown fields";
            self.causes.push(Cause::invalid(&place, default, why));
        }
        for cause in parsed.check(&value, None, &none) {
            let place = format!("{place}.{}", cause.field);
            let place = place.trim_end_matches('.');
            self.causes
                .push(Cause::invalid(place, default, &cause.message));
        }
    }

    /// `outer` must declare every field that a junctor's member limits.
    fn junctor(&mut self, schema: &Value, outer: &Value, path: &str, int_or_string: bool) {
        for (key, _) in object::members(schema, &[]) {
            if int_or_string && key == "type" {
                continue; // The usual way to write an integer or a string.
            }
            if NOT_IN_JUNCTORS.contains(&key.as_str()) {
                let why = "must be empty to be structural";
                self.forbid(format!("{path}.{key}"), why);
            } else if !KNOWN.contains(&key.as_str()) {
                self.forbid(format!("{path}.{key}"), "unknown field");
            }
        }
        for (name, inner) in object::members(schema, &["properties"]) {
            let place = format!("{path}.properties[{name}]");
            match object::at(outer, &["properties", name]) {
                Some(outer) => self.junctor(inner, outer, &place, false),
                None => {
                    let why = "because it is defined in a junctor, it must be defined outside too";
                    self.causes.push(Cause::required(place, why));
                }
            }
        }
        if let (Some(inner), Some(outer)) = (schema.get("items"), outer.get("items")) {
            self.junctor(inner, outer, &format!("{path}.items"), false);
        }
        for junctor in ["allOf", "anyOf", "oneOf"] {
            for (index, one) in object::list(schema, &[junctor]).iter().enumerate() {
                self.junctor(
                    one,
                    outer,
                    &format!("{path}.{junctor}[{index}]"),
                    int_or_string,
                );
            }
        }
        if let Some(not) = schema.get("not") {
            self.junctor(not, outer, &format!("{path}.not"), false);
        }
    }
}

fn flag(schema: &Value, key: &str) -> bool {
    schema.get(key).and_then(Value::as_bool) == Some(true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wrong(property: &Value) -> Vec<String> {
        let schema = json!({"type": "object", "properties": {"p": property}});
        check(&schema, "s")
            .into_iter()
            .map(|cause| cause.field)
            .collect()
    }

    #[test]
    fn structural_schemas_pass() {
        for property in [
            json!({"type": "string", "pattern": "^a", "description": "d"}),
            json!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]}),
            json!({"x-kubernetes-preserve-unknown-fields": true}),
            json!({"type": "object", "additionalProperties": {"type": "string"}}),
            json!({
                "type": "object", "properties": {"a": {"type": "string"}},
                "oneOf": [{"required": ["a"]}, {"properties": {"a": {"enum": ["x"]}}}],
            }),
            json!({
                "type": "array", "maxItems": 100, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["n"],
                "items": {"type": "object", "required": ["n"], "properties": {"n": {
                    "type": "string", "maxLength": 63,
                    "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "m"}],
                }}},
            }),
            json!({"type": "integer", "default": 1, "minimum": 1}),
        ] {
            assert_eq!(wrong(&property), Vec::<String>::new(), "{property}");
        }
    }

    #[test]
    fn others_are_refused_with_their_place() {
        for (property, place) in [
            (json!({"description": "no type"}), "p].type"),
            (json!({"type": "text"}), "p].type"),
            (json!({"type": "array"}), "p].items"),
            (json!({"type": "string", "$ref": "x"}), "p].$ref"),
            (json!({"type": "string", "titel": "x"}), "p].titel"),
            (
                json!({"type": "array", "uniqueItems": true, "items": {"type": "string"}}),
                "uniqueItems",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": true}),
                "additionalProperties",
            ),
            (
                json!({"type": "string", "anyOf": [{"type": "string"}]}),
                "anyOf[0].type",
            ),
            (
                json!({"type": "object", "oneOf": [{"properties": {"a": {}}}]}),
                "oneOf[0].properties[a]",
            ),
            (json!({"type": "integer", "default": "x"}), "default"),
            (
                json!({"type": "integer", "minimum": 2, "default": 1}),
                "default",
            ),
            (json!({"type": "string", "pattern": "("}), "pattern"),
            (
                json!({"type": "array", "x-kubernetes-list-type": "map", "items": {"type": "object"}}),
                "x-kubernetes-list-map-keys",
            ),
            (
                json!({"type": "string", "x-kubernetes-validations": [{"rule": "self."}]}),
                "rule",
            ),
            (
                json!({"type": "array", "maxItems": 100, "items": {
                    "type": "string", "x-kubernetes-validations": [{"rule": "isIP(self)"}],
                }}),
                "rule",
            ),
            (
                json!({"type": "array", "items": {
                    "type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf"}],
                }}),
                "rule",
            ),
        ] {
            let said = wrong(&property);
            assert!(
                said.len() == 1 && said[0].ends_with(place),
                "{property}: {said:?}"
            );
        }
    }
}
