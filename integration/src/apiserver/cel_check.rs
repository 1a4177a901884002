//! Checks a rule's expression against the schema of its place: names that are not declared, and
//! members that the schema does not have. The real server compiles rules with types; this finds
//! what is most often wrong, not every type error.

use cel::common::ast::{EntryExpr, Expr, IdedExpr};

use super::schema::{Schema, Type};

/// Words that CEL keeps for itself: as names of members they are written `__word__`.
const RESERVED: &[&str] = &[
    "as",
    "break",
    "const",
    "continue",
    "else",
    "false",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "null",
    "package",
    "return",
    "true",
    "var",
    "void",
    "while",
];

/// A member's name as expressions write it.
pub(crate) fn escape(name: &str) -> String {
    if RESERVED.contains(&name) {
        return format!("__{name}__");
    }
    name.replace("__", "__underscores__")
        .replace('.', "__dot__")
        .replace('-', "__dash__")
        .replace('/', "__slash__")
}

/// Functions that rules can call: CEL's own, its extensions for strings and lists, and Kubernetes'.
const FUNCTIONS: &[&str] = &[
    "all",
    "bool",
    "bytes",
    "ceil",
    "charAt",
    "cidr",
    "contains",
    "containsCIDR",
    "containsIP",
    "distinct",
    "double",
    "duration",
    "dyn",
    "endsWith",
    "exists",
    "exists_one",
    "family",
    "filter",
    "first",
    "flatten",
    "format",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getFullYear",
    "getHours",
    "getMilliseconds",
    "getMinutes",
    "getMonth",
    "getSeconds",
    "has",
    "hasValue",
    "indexOf",
    "int",
    "ip",
    "isCIDR",
    "isIP",
    "isSorted",
    "join",
    "last",
    "lastIndexOf",
    "lowerAscii",
    "map",
    "masked",
    "matches",
    "max",
    "min",
    "optional.none",
    "optional.of",
    "optional.ofNonZeroValue",
    "orValue",
    "prefixLength",
    "quote",
    "range",
    "replace",
    "reverse",
    "size",
    "slice",
    "sort",
    "sortBy",
    "split",
    "startsWith",
    "string",
    "substring",
    "sum",
    "timestamp",
    "trim",
    "type",
    "uint",
    "upperAscii",
    "value",
];

struct Scope<'a> {
    /// Bound names, the innermost last; nothing is known of those without a schema.
    bound: Vec<(&'a str, Option<&'a Schema>)>,
}

/// # Errors
///
/// A sentence about the first name that is unknown.
pub(crate) fn check(
    expression: &IdedExpr,
    schema: &Schema,
    optional_old: bool,
) -> Result<(), String> {
    let old = (!optional_old).then_some(schema);
    let mut scope = Scope {
        bound: vec![("self", Some(schema)), ("oldSelf", old)],
    };
    scope.type_of(expression).map(drop)
}

impl<'a> Scope<'a> {
    fn type_of(&mut self, expression: &'a IdedExpr) -> Result<Option<&'a Schema>, String> {
        match &expression.expr {
            Expr::Ident(name) => self.name(name),
            Expr::Select(select) => {
                let operand = self.type_of(&select.operand)?;
                member(operand, &select.field)
            }
            Expr::Call(call) => {
                let name = call.func_name.as_str();
                let operator = name.starts_with(|c: char| !c.is_ascii_alphabetic());
                if !operator && !FUNCTIONS.contains(&name) {
                    return Err(format!(
                        "undeclared reference to '{name}' (in container '')"
                    ));
                }
                // `optional.of` and its kin: a namespace, and no name of a value.
                let target = call.target.as_deref();
                let target = target.filter(|target| !is_ident(target, "optional"));
                if let Some(target) = target {
                    self.type_of(target)?;
                }
                let mut first = None;
                for (index, argument) in call.args.iter().enumerate() {
                    let of = self.type_of(argument)?;
                    if index == 0 {
                        first = of;
                    }
                }
                Ok(match name {
                    "_[_]" => first.and_then(element),
                    _ => None,
                })
            }
            Expr::Comprehension(loops) => {
                let range = self.type_of(&loops.iter_range)?;
                self.type_of(&loops.accu_init)?;
                let before = self.bound.len();
                self.bound.push((&loops.accu_var, None));
                let item = range
                    .filter(|range| range.kind == Type::Array)
                    .and_then(element);
                match &loops.iter_var2 {
                    Some(second) => {
                        self.bound.push((&loops.iter_var, None));
                        self.bound.push((second, range.and_then(element)));
                    }
                    None => self.bound.push((&loops.iter_var, item)),
                }
                self.type_of(&loops.loop_cond)?;
                self.type_of(&loops.loop_step)?;
                self.type_of(&loops.result)?;
                self.bound.truncate(before);
                Ok(None)
            }
            Expr::List(list) => {
                for element in &list.elements {
                    self.type_of(element)?;
                }
                Ok(None)
            }
            Expr::Map(map) => self.entries(&map.entries),
            Expr::Struct(made) => self.entries(&made.entries),
            Expr::Literal(_) | Expr::Unspecified => Ok(None),
        }
    }

    fn entries(
        &mut self,
        entries: &'a [cel::common::ast::IdedEntryExpr],
    ) -> Result<Option<&'a Schema>, String> {
        for entry in entries {
            match &entry.expr {
                EntryExpr::StructField(field) => {
                    self.type_of(&field.value)?;
                }
                EntryExpr::MapEntry(entry) => {
                    self.type_of(&entry.key)?;
                    self.type_of(&entry.value)?;
                }
            }
        }
        Ok(None)
    }

    fn name(&self, name: &str) -> Result<Option<&'a Schema>, String> {
        if let Some((_, schema)) = self.bound.iter().rev().find(|(one, _)| *one == name) {
            return Ok(*schema);
        }
        let types = [
            "bool",
            "bytes",
            "double",
            "duration",
            "int",
            "list",
            "map",
            "null_type",
            "string",
            "timestamp",
            "type",
            "uint",
        ];
        if name.starts_with('@') || types.contains(&name) {
            return Ok(None);
        }
        Err(format!(
            "undeclared reference to '{name}' (in container '')"
        ))
    }
}

fn is_ident(expression: &IdedExpr, name: &str) -> bool {
    matches!(&expression.expr, Expr::Ident(one) if one == name)
}

/// What is in a list, or under a key of a map.
fn element(schema: &Schema) -> Option<&Schema> {
    schema.items.as_deref().or(schema.additional.as_deref())
}

fn member<'a>(operand: Option<&'a Schema>, field: &str) -> Result<Option<&'a Schema>, String> {
    let Some(schema) = operand else {
        return Ok(None);
    };
    if let Some((_, member)) = schema
        .properties
        .iter()
        .find(|(name, _)| escape(name) == field)
    {
        return Ok(Some(member));
    }
    if schema.additional.is_some() {
        return Ok(schema.additional.as_deref());
    }
    let implicit = matches!(field, "apiVersion" | "kind" | "metadata");
    if implicit || schema.kind == Type::Any || schema.kind == Type::IntOrString {
        return Ok(None);
    }
    Err(format!("undefined field '{field}'"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(rule: &str) -> Result<(), String> {
        let schema = Schema::parse(&json!({"type": "object", "properties": {
            "namespace": {"type": "string"}, "a-b": {"type": "string"},
            "ports": {"type": "array", "items": {"type": "object", "properties": {
                "port": {"type": "integer"},
            }}},
            "tags": {"type": "object", "additionalProperties": {"type": "string"}},
        }}))
        .unwrap();
        let program = cel::Program::compile(rule).unwrap();
        check(program.expression(), &schema, false)
    }

    #[test]
    fn what_the_schema_has_is_found() {
        for rule in [
            "self.__namespace__ == oldSelf.a__dash__b",
            "self.ports.all(p, p.port > 0 && self.ports.exists(q, q.port == p.port))",
            "has(self.tags) && self.tags.all(k, k.size() > 0) && self.tags['x'] == 'y'",
            "self.ports[0].port == 1 || self.tags.x == 'a'",
            "self.metadata.name == 'default'",
        ] {
            assert_eq!(checked(rule), Ok(()), "{rule}");
        }
    }

    #[test]
    fn what_it_has_not_is_told() {
        for (rule, said) in [
            ("self.port == 1", "undefined field 'port'"),
            ("self.namespace == 'a'", "undefined field 'namespace'"),
            ("self.ports.all(p, p.prot > 0)", "undefined field 'prot'"),
            ("other == 1", "undeclared reference to 'other'"),
            ("self.ports.each(p) == 1", "undeclared reference to"),
        ] {
            let got = checked(rule).unwrap_err();
            assert!(got.starts_with(said), "{rule}: {got}");
        }
    }
}
