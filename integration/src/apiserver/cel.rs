//! Validation rules of custom resources: CEL expressions over `self` and `oldSelf`.

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use cel::{Context, Env, Program};
use serde_json::Value;

use super::{cel_check, cel_cost, error::Cause, schema::Schema};

/// One of `x-kubernetes-validations`.
#[derive(Clone)]
pub(crate) struct Rule {
    source: String,
    program: Arc<Program>,
    message: Option<String>,
    message_program: Option<Arc<Program>>,
    field_path: Option<String>,
    reason: &'static str,
    /// It names `oldSelf`: it holds only for changes.
    compares: bool,
    /// It also runs without an old value, which is an optional then.
    optional_old: bool,
}

impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rule")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// CEL as it is without what Kubernetes adds.
static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    // Each fails only if its names are taken, which a test would show.
    type Extension = fn(&mut Env) -> Result<(), cel::DeclarationError>;
    for extend in [
        cel::extensions::strings as Extension,
        cel::extensions::lists,
    ] {
        env.add_extension(extend).unwrap_or_default();
    }
    Arc::new(env)
});

impl Rule {
    /// Compiles a rule.
    ///
    /// # Errors
    ///
    /// A sentence if it does not compile, or says something that is unknown.
    pub(crate) fn parse(raw: &Value) -> Result<Self, String> {
        let text = |key: &str| raw.get(key).and_then(Value::as_str).map(str::to_owned);
        let source = text("rule").ok_or("a rule without `rule`")?;
        let program = compile(&source)?;
        let message_program = text("messageExpression");
        let message_program = message_program.as_deref().map(compile).transpose()?;
        let references = program.references();
        let compares = references.has_variable("oldSelf");
        let reason = match text("reason").as_deref() {
            None | Some("FieldValueInvalid") => "FieldValueInvalid",
            Some("FieldValueForbidden") => "FieldValueForbidden",
            Some("FieldValueRequired") => "FieldValueRequired",
            Some("FieldValueDuplicate") => "FieldValueDuplicate",
            Some(other) => return Err(format!("unknown reason {other:?}")),
        };
        Ok(Self {
            compares,
            program: Arc::new(program),
            message: text("message"),
            message_program: message_program.map(Arc::new),
            field_path: text("fieldPath"),
            reason,
            optional_old: raw.get("optionalOldSelf").and_then(Value::as_bool) == Some(true),
            source,
        })
    }

    /// Whether the rule compares with what was before.
    pub(crate) fn compares(&self) -> bool {
        self.compares
    }

    /// Whether what it names is there.
    ///
    /// # Errors
    ///
    /// A sentence about a name that is not.
    pub(crate) fn fits(&self, schema: &Schema) -> Result<(), String> {
        let programs = [Some(&self.program), self.message_program.as_ref()];
        for program in programs.into_iter().flatten() {
            cel_check::check(program.expression(), schema, self.optional_old)
                .map_err(|error| format!("compilation failed: {error}"))?;
        }
        Ok(())
    }

    /// The most that it can cost once.
    pub(crate) fn cost(&self, schema: &Schema) -> f64 {
        cel_cost::cost(self.program.expression(), schema)
    }

    /// What is wrong with `value` by this rule; nothing if it does not apply.
    pub(crate) fn broken(
        &self,
        schema: &Schema,
        value: &Value,
        old: Option<&Value>,
        path: &str,
    ) -> Option<Cause> {
        if self.compares && old.is_none() && !self.optional_old {
            return None;
        }
        let old = old.map(|old| cel_value(old, Some(schema)));
        let context = self.context(cel_value(value, Some(schema)), old);
        let said = match self.program.execute(&context) {
            Ok(cel::Value::Bool(true)) => return None,
            Ok(cel::Value::Bool(false)) => self.said(&context),
            Ok(other) => format!("rule is no condition: {:?}", other.type_of()),
            Err(error) => format!("rule: {}: {error}", self.source),
        };
        let field = format!("{path}{}", self.field_path.as_deref().unwrap_or_default());
        let shown = match value {
            Value::Object(_) => Value::from("object"),
            Value::Array(_) => Value::from("array"),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
        };
        let message = match self.reason {
            "FieldValueForbidden" => format!("Forbidden: {said}"),
            "FieldValueRequired" => format!("Required value: {said}"),
            "FieldValueDuplicate" => format!("Duplicate value: {shown}"),
            _ => format!("Invalid value: {shown}: {said}"),
        };
        Some(Cause {
            field: field.trim_start_matches('.').to_owned(),
            reason: self.reason,
            message,
        })
    }

    fn context(&self, value: cel::Value, old: Option<cel::Value>) -> Context<'static, 'static> {
        let mut context = Context::with_env(Arc::clone(&ENVIRONMENT));
        context.add_variable_from_value("self", value);
        match old {
            Some(old) if self.optional_old => {
                let old = cel::objects::OptionalValue::of(old);
                context.add_variable_from_value("oldSelf", cel::Value::Opaque(Arc::new(old)));
            }
            None if self.optional_old => {
                let none = cel::objects::OptionalValue::none();
                context.add_variable_from_value("oldSelf", cel::Value::Opaque(Arc::new(none)));
            }
            Some(old) => context.add_variable_from_value("oldSelf", old),
            None => {}
        }
        add_functions(&mut context);
        context
    }

    fn said(&self, context: &Context<'_, '_>) -> String {
        let computed =
            self.message_program
                .as_ref()
                .and_then(|program| match program.execute(context) {
                    Ok(cel::Value::String(text)) if !text.trim().is_empty() => {
                        Some(text.to_string())
                    }
                    _ => None,
                });
        computed
            .or_else(|| self.message.clone())
            .unwrap_or_else(|| format!("failed rule: {}", self.source))
    }
}

fn compile(source: &str) -> Result<Program, String> {
    ENVIRONMENT
        .compile(source)
        .map_err(|error| format!("compilation failed: {error}"))
}

/// JSON as CEL has it: whole numbers are `int`, and members that a schema declares are escaped.
fn cel_value(value: &Value, schema: Option<&Schema>) -> cel::Value {
    match value {
        Value::Null => cel::Value::Null,
        Value::Bool(yes) => cel::Value::Bool(*yes),
        Value::Number(number) => match number.as_i64() {
            Some(number) => cel::Value::Int(number),
            None => cel::Value::Float(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => cel::Value::String(Arc::new(text.clone())),
        Value::Array(items) => {
            let of = schema.and_then(|schema| schema.items.as_deref());
            cel::Value::List(Arc::new(
                items.iter().map(|item| cel_value(item, of)).collect(),
            ))
        }
        Value::Object(map) => {
            let member = |(key, value): (&String, &Value)| {
                let declared = schema.is_some_and(|schema| schema.properties.contains_key(key));
                let name = if declared {
                    cel_check::escape(key)
                } else {
                    key.clone()
                };
                (
                    name,
                    cel_value(value, schema.and_then(|schema| schema.member(key))),
                )
            };
            let map: std::collections::HashMap<String, cel::Value> =
                map.iter().map(member).collect();
            cel::Value::Map(map.into())
        }
    }
}

/// The libraries that Kubernetes adds, as far as they are about addresses: an address and a
/// network are texts here, with the same functions.
fn add_functions(context: &mut Context<'_, '_>) {
    let address = |text: &str| text.parse::<IpAddr>().ok();
    let network = |text: &str| text.parse::<ipnet::IpNet>().ok();
    let fails = |name: &'static str, text: &str| {
        cel::ExecutionError::function_error(name, format!("cannot parse {text:?}"))
    };
    type Text = Arc<String>;
    let added = [
        context.add_function("isIP", move |text: Text| address(&text).is_some()),
        context.add_function("isCIDR", move |text: Text| {
            text.split_once('/').is_some() && network(&text).is_some()
        }),
        context.add_function("ip", move |text: Text| {
            let known = address(&text).or_else(|| network(&text).map(|network| network.addr()));
            let known = known.ok_or_else(|| fails("ip", &text))?;
            Ok::<cel::Value, cel::ExecutionError>(known.to_string().into())
        }),
        context.add_function("cidr", move |text: Text| {
            let known = network(&text).ok_or_else(|| fails("cidr", &text))?;
            Ok::<cel::Value, cel::ExecutionError>(known.to_string().into())
        }),
        context.add_function("family", move |this: cel::extractors::This<Text>| {
            let this = &this.0;
            let known = address(this).or_else(|| network(this).map(|network| network.addr()));
            let known = known.ok_or_else(|| fails("family", this))?;
            let family = if known.is_ipv4() { 4 } else { 6 };
            Ok::<_, cel::ExecutionError>(cel::Value::Int(family))
        }),
        context.add_function("prefixLength", move |this: cel::extractors::This<Text>| {
            let known = network(&this.0).ok_or_else(|| fails("prefixLength", &this.0))?;
            Ok::<_, cel::ExecutionError>(cel::Value::Int(known.prefix_len().into()))
        }),
        context.add_function("masked", move |this: cel::extractors::This<Text>| {
            let known = network(&this.0).ok_or_else(|| fails("masked", &this.0))?;
            Ok::<cel::Value, cel::ExecutionError>(known.trunc().to_string().into())
        }),
        context.add_function(
            "containsIP",
            move |this: cel::extractors::This<Text>, other: Text| {
                let known = network(&this.0).ok_or_else(|| fails("containsIP", &this.0))?;
                let other = address(&other).ok_or_else(|| fails("containsIP", &other))?;
                Ok::<_, cel::ExecutionError>(cel::Value::Bool(known.contains(&other)))
            },
        ),
        context.add_function(
            "containsCIDR",
            move |this: cel::extractors::This<Text>, other: Text| {
                let known = network(&this.0).ok_or_else(|| fails("containsCIDR", &this.0))?;
                let other = network(&other).ok_or_else(|| fails("containsCIDR", &other))?;
                Ok::<_, cel::ExecutionError>(cel::Value::Bool(known.contains(&other)))
            },
        ),
    ];
    debug_assert!(added.iter().all(Result::is_ok), "{added:?}");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(rule: &str, value: &Value, old: Option<&Value>) -> Option<String> {
        let rule = Rule::parse(&json!({"rule": rule})).unwrap();
        rule.broken(&Schema::default(), value, old, "spec")
            .map(|cause| cause.message)
    }

    #[test]
    fn rules_hold_or_are_broken() {
        for (rule, value, holds) in [
            ("self.a <= self.b", json!({"a": 1, "b": 2}), true),
            ("self.a <= self.b", json!({"a": 3, "b": 2}), false),
            ("!has(self.a) || self.a.size() > 0", json!({}), true),
            ("self.all(x, x.startsWith('a'))", json!(["ab", "b"]), false),
            ("self.matches('^[a-z]+$')", json!("abc"), true),
            ("isCIDR(self)", json!("10.0.0.0/8"), true),
            ("isCIDR(self)", json!("10.0.0.0"), false),
            ("isIP(self)", json!("fd00::1"), true),
            ("ip(self).family() == 6", json!("fd00::1"), true),
            (
                "cidr(self).containsIP('10.1.2.3')",
                json!("10.0.0.0/8"),
                true,
            ),
            (
                "cidr(self).prefixLength() <= 24",
                json!("10.0.0.0/28"),
                false,
            ),
            ("self.exists(k, k == 'x')", json!({"x": 1}), true),
            ("self.split(',').size() == 2", json!("a,b"), true),
        ] {
            assert_eq!(
                said(rule, &value, None).is_none(),
                holds,
                "{rule} on {value}"
            );
        }
    }

    #[test]
    fn rules_that_compare_hold_only_for_changes() {
        let rule = "self == oldSelf";
        assert_eq!(said(rule, &json!("a"), None), None);
        assert_eq!(said(rule, &json!("a"), Some(&json!("a"))), None);
        assert!(said(rule, &json!("a"), Some(&json!("b"))).is_some());
    }

    #[test]
    fn an_old_value_may_be_optional() {
        let rule = json!({
            "rule": "!oldSelf.hasValue() || oldSelf.value() == self", "optionalOldSelf": true,
            "message": "immutable",
        });
        let rule = Rule::parse(&rule).unwrap();
        assert!(
            rule.broken(&Schema::default(), &json!("a"), None, "spec")
                .is_none()
        );
        let cause = rule
            .broken(&Schema::default(), &json!("a"), Some(&json!("b")), "spec")
            .unwrap();
        assert!(cause.message.ends_with("immutable"), "{}", cause.message);
    }

    #[test]
    fn messages_are_computed_and_places_named() {
        let rule = json!({
            "rule": "self.min <= self.max", "fieldPath": ".min",
            "messageExpression": "'min is ' + string(self.min)", "reason": "FieldValueForbidden",
        });
        let rule = Rule::parse(&rule).unwrap();
        let cause = rule
            .broken(
                &Schema::default(),
                &json!({"min": 2, "max": 1}),
                None,
                "spec",
            )
            .unwrap();
        assert_eq!(
            (cause.field.as_str(), cause.reason),
            ("spec.min", "FieldValueForbidden")
        );
        assert_eq!(cause.message, "Forbidden: min is 2");
    }

    #[test]
    fn what_does_not_compile_is_refused() {
        for rule in ["self.", "self ==="] {
            assert!(Rule::parse(&json!({"rule": rule})).is_err(), "{rule}");
        }
    }
}
