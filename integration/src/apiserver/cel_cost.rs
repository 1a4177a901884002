//! What a rule may cost at most: the real server refuses definitions whose rules could take too
//! long on the largest object that fits into a request. This follows its model (`cel-go`'s cost
//! estimates with the sizes that a schema allows) closely enough to find a missing `maxItems`,
//! `maxProperties` or `maxLength`; near the limit it may differ.

use cel::common::ast::{EntryExpr, Expr, IdedExpr, LiteralValue};

use super::{
    cel_check::escape,
    schema::{Schema, Type},
};

/// One rule's limit, over all places where it holds.
pub(crate) const RULE_MAX: f64 = 10_000_000.0;

/// The limit of all rules of a definition's version.
pub(crate) const TOTAL_MAX: f64 = 100_000_000.0;

/// Bytes of the largest request: what has no limit of its own is at most this long.
const REQUEST_MAX: f64 = 3_145_728.0;

/// What walking over a string costs, per character.
const PER_CHARACTER: f64 = 0.1;

/// A value's schema, if it is known, and how many characters or items it can have.
#[derive(Clone, Copy)]
struct Known<'a> {
    schema: Option<&'a Schema>,
    size: f64,
}

const SMALL: Known<'static> = Known {
    schema: None,
    size: 1.0,
};

/// How often something can be in what a schema allows: items of a list, members of a map.
pub(crate) fn size(schema: &Schema) -> f64 {
    let (text, items, members) = schema.most();
    let given = |count: Option<usize>| count.map(|count| count as f64);
    match schema.kind {
        Type::Text => given(text).unwrap_or(REQUEST_MAX - 2.0),
        Type::IntOrString | Type::Any => REQUEST_MAX - 2.0,
        Type::Array => given(items).unwrap_or_else(|| {
            let item = schema.items.as_deref().map_or(2.0, smallest);
            (REQUEST_MAX - 2.0) / (item + 1.0)
        }),
        Type::Object => match &schema.additional {
            None => 1.0,
            Some(values) => {
                given(members).unwrap_or_else(|| (REQUEST_MAX - 2.0) / (smallest(values) + 6.0))
            }
        },
        Type::Integer | Type::Number | Type::Boolean => 1.0,
    }
}

/// Bytes of the shortest JSON that a schema allows.
fn smallest(schema: &Schema) -> f64 {
    match schema.kind {
        Type::Object => {
            let required = schema.required.iter().filter_map(|name| {
                let member = schema.properties.get(name)?;
                Some(name.len() as f64 + 4.0 + smallest(member))
            });
            2.0 + required.sum::<f64>()
        }
        Type::Text | Type::Array => 2.0,
        Type::Boolean => 4.0,
        Type::Integer | Type::Number | Type::IntOrString | Type::Any => 1.0,
    }
}

/// The most that an expression can cost once.
pub(crate) fn cost(expression: &IdedExpr, schema: &Schema) -> f64 {
    let this = Known {
        schema: Some(schema),
        size: size(schema),
    };
    let mut estimate = Estimate {
        cost: 0.0,
        bound: vec![("self", this), ("oldSelf", this)],
    };
    estimate.of(expression);
    estimate.cost
}

struct Estimate<'a> {
    cost: f64,
    bound: Vec<(&'a str, Known<'a>)>,
}

impl<'a> Estimate<'a> {
    fn of(&mut self, expression: &'a IdedExpr) -> Known<'a> {
        match &expression.expr {
            Expr::Ident(name) => {
                self.cost += 1.0;
                let bound = self.bound.iter().rev().find(|(one, _)| one == name);
                bound.map_or(SMALL, |(_, known)| *known)
            }
            Expr::Select(select) => {
                let operand = self.of(&select.operand);
                self.cost += 1.0;
                let member = operand.schema.and_then(|schema| {
                    let declared = schema.properties.iter();
                    let mut declared = declared.filter(|(name, _)| escape(name) == select.field);
                    let declared = declared.next().map(|(_, member)| member);
                    declared.or(schema.additional.as_deref())
                });
                member.map_or(SMALL, known)
            }
            Expr::Call(call) => {
                let target = call.target.as_deref().map(|target| self.of(target));
                let arguments: Vec<_> = call.args.iter().map(|one| self.of(one)).collect();
                self.call(&call.func_name, target, &arguments)
            }
            Expr::Comprehension(loops) => {
                let range = self.of(&loops.iter_range);
                self.of(&loops.accu_init);
                let before = (self.bound.len(), self.cost);
                self.bound.push((&loops.accu_var, SMALL));
                let element = range.schema.and_then(element).map_or(SMALL, known);
                let is_map = range
                    .schema
                    .is_some_and(|schema| schema.kind == Type::Object);
                let key = Known {
                    schema: None,
                    size: if is_map { REQUEST_MAX } else { 1.0 },
                };
                match &loops.iter_var2 {
                    Some(second) => {
                        self.bound.push((&loops.iter_var, key));
                        self.bound.push((second, element));
                    }
                    None if is_map => self.bound.push((&loops.iter_var, key)),
                    None => self.bound.push((&loops.iter_var, element)),
                }
                self.of(&loops.loop_cond);
                self.of(&loops.loop_step);
                let once = self.cost - before.1;
                self.cost = before.1 + once * range.size;
                self.of(&loops.result);
                self.bound.truncate(before.0);
                Known {
                    schema: None,
                    size: range.size,
                }
            }
            Expr::List(list) => {
                self.cost += 10.0;
                let count = list.elements.iter().map(|one| self.of(one)).count();
                Known {
                    schema: None,
                    size: f64::from(u32::try_from(count).unwrap_or(u32::MAX)),
                }
            }
            Expr::Map(map) => self.entries(&map.entries),
            Expr::Struct(made) => self.entries(&made.entries),
            Expr::Literal(LiteralValue::String(text)) => Known {
                schema: None,
                size: f64::from(u32::try_from(text.inner().len()).unwrap_or(u32::MAX)),
            },
            Expr::Literal(_) | Expr::Unspecified => SMALL,
        }
    }

    fn entries(&mut self, entries: &'a [cel::common::ast::IdedEntryExpr]) -> Known<'a> {
        self.cost += 30.0;
        for entry in entries {
            match &entry.expr {
                EntryExpr::StructField(field) => {
                    self.of(&field.value);
                }
                EntryExpr::MapEntry(entry) => {
                    self.of(&entry.key);
                    self.of(&entry.value);
                }
            }
        }
        SMALL
    }

    fn call(
        &mut self,
        name: &str,
        target: Option<Known<'a>>,
        arguments: &[Known<'a>],
    ) -> Known<'a> {
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(SMALL);
        let subject = target.unwrap_or_else(|| argument(0));
        let other = if target.is_some() {
            argument(0)
        } else {
            argument(1)
        };
        let walked = |known: Known<'_>| (known.size * PER_CHARACTER).ceil();
        let of_size = |size: f64| Known { schema: None, size };
        let (cost, result) = match name {
            "_[_]" => {
                let element = subject.schema.and_then(element);
                (1.0, element.map_or(SMALL, known))
            }
            "_?_:_" => {
                let (yes, no) = (argument(1), argument(2));
                (1.0, if yes.size > no.size { yes } else { no })
            }
            "_==_" | "_!=_" | "_<_" | "_<=_" | "_>_" | "_>=_" => (
                (subject.size.min(other.size) * PER_CHARACTER)
                    .ceil()
                    .max(1.0),
                SMALL,
            ),
            "_+_" => {
                let size = subject.size + other.size;
                ((size * PER_CHARACTER).ceil().max(1.0), of_size(size))
            }
            "@in" | "in" => (other.size, SMALL),
            "startsWith" | "endsWith" => (walked(other), SMALL),
            "contains" => (walked(subject) * walked(other), SMALL),
            "matches" => {
                let pattern = (other.size * 0.25).ceil();
                (
                    ((subject.size + 1.0) * PER_CHARACTER).ceil() * pattern,
                    SMALL,
                )
            }
            "isIP" | "isCIDR" | "ip" | "cidr" | "split" | "lowerAscii" | "upperAscii" | "trim"
            | "replace" | "substring" | "indexOf" | "lastIndexOf" | "reverse" => {
                (walked(subject), of_size(subject.size))
            }
            "isSorted" | "sum" | "min" | "max" | "join" | "distinct" | "sort" => {
                (subject.size, of_size(subject.size))
            }
            "string" => (1.0, of_size(subject.size.max(20.0))),
            _ => (1.0, SMALL),
        };
        self.cost += cost;
        result
    }
}

fn known(schema: &Schema) -> Known<'_> {
    Known {
        schema: Some(schema),
        size: size(schema),
    }
}

fn element(schema: &Schema) -> Option<&Schema> {
    schema.items.as_deref().or(schema.additional.as_deref())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn cost_of(rule: &str, schema: &Value) -> f64 {
        let program = cel::Program::compile(rule).unwrap();
        cost(program.expression(), &Schema::parse(schema).unwrap())
    }

    #[test]
    fn limits_in_the_schema_make_rules_cheap() {
        let list = |limits: Value| {
            let mut list = json!({"type": "array", "items": {"type": "string"}});
            super::super::patch::merge(&mut list, &limits);
            list
        };
        let rule = "self.all(x, self.exists(y, x == y))";
        assert!(cost_of(rule, &list(json!({}))) > RULE_MAX);
        let limits = json!({"maxItems": 16, "items": {"maxLength": 63}});
        assert!(cost_of(rule, &list(limits)) < RULE_MAX / 100.0);
        assert!(cost_of("self.size() < 10", &list(json!({}))) < 10.0);
    }

    #[test]
    fn long_strings_are_dear_only_where_they_are_walked() {
        let text = json!({"type": "string"});
        assert!(cost_of("self == oldSelf", &text) < RULE_MAX);
        assert!(cost_of("self.matches('^[a-z]+$')", &text) < RULE_MAX);
        let list = json!({"type": "array", "maxItems": 100, "items": text});
        assert!(cost_of("self.all(x, x.matches('^[a-z]+$'))", &list) > RULE_MAX);
    }
}
