//! The API's definition (Swagger 2.0), as far as Firecracker's uses it: what a document must be, and examples of one.

use std::path::Path;

use serde_json::{Map, Value};

/// A whole definition.
pub struct Spec(Value);

/// Takes one of so many.
pub type Choose<'a> = dyn FnMut(usize) -> usize + 'a;

impl Spec {
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self::parse(&text)
    }

    pub fn parse(yaml: &str) -> Self {
        // Statuses are numbers in YAML and names in JSON.
        fn names(value: serde_norway::Value) -> Value {
            match value {
                serde_norway::Value::Mapping(entries) => Value::Object(
                    entries
                        .into_iter()
                        .map(|(key, value)| {
                            let key = key.as_str().map(str::to_owned).or_else(|| Some(key.as_u64()?.to_string()));
                            (key.expect("a name or a status"), names(value))
                        })
                        .collect(),
                ),
                serde_norway::Value::Sequence(items) => items.into_iter().map(names).collect(),
                scalar => serde_norway::from_value(scalar).expect("a scalar of JSON"),
            }
        }
        Self(names(serde_norway::from_str(yaml).expect("the definition is YAML")))
    }

    /// Every operation: method, path and definition.
    pub fn operations(&self) -> Vec<(String, String, &Value)> {
        let paths = self.0["paths"].as_object().expect("there are paths");
        let each = |(path, methods)| as_object(methods).iter().map(move |(method, op)| (method.to_uppercase(), path, op));
        paths.iter().flat_map(each).map(|(method, path, op): (String, &String, &Value)| (method, path.clone(), op)).collect()
    }

    /// What is wrong with a request: its method, its path or its body. Without a fault, the path's pattern.
    pub fn check_request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String, String> {
        let operations = self.operations();
        let (_, pattern, op) =
            operations.iter().find(|(m, p, _)| m == method && fits(p, path)).ok_or(format!("{method} {path} is not defined"))?;
        let parameter = op["parameters"].as_array().and_then(|all| all.iter().find(|parameter| parameter["in"] == "body"));
        match (parameter, body) {
            (Some(parameter), Some(body)) => self.check(&parameter["schema"], body, "body")?,
            (Some(parameter), None) if parameter["required"] == true => return Err(format!("{method} {path} needs a body")),
            (None, Some(_)) => return Err(format!("{method} {path} has no body")),
            _ => {}
        }
        Ok(pattern.clone())
    }

    /// Whether a document is what its schema says. What a schema does not name is wrong: Firecracker refuses it.
    pub fn check(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        let schema = self.resolve(schema);
        let is = |right: bool| if right { Ok(()) } else { Err(format!("{at}: {value} is not of type {}", schema["type"])) };
        match schema["type"].as_str() {
            Some("object") => self.check_object(schema, value.as_object().ok_or(format!("{at}: {value} is no object"))?, at)?,
            Some("array") => {
                for (n, item) in value.as_array().ok_or(format!("{at}: {value} is no array"))?.iter().enumerate() {
                    self.check(&schema["items"], item, &format!("{at}[{n}]"))?;
                }
            }
            Some("string") => is(value.is_string())?,
            Some("boolean") => is(value.is_boolean())?,
            // Where nothing else is said an integer is one of 64 bits.
            Some("integer") => is(value.as_i64().is_some())?,
            other => return Err(format!("{at}: schemas of type {other:?} are not known here")),
        }
        if schema["minimum"].as_i64().is_some_and(|least| value.as_i64() < Some(least)) {
            return Err(format!("{at}: {value} is less than {}", schema["minimum"]));
        }
        if schema["maximum"].as_i64().is_some_and(|most| value.as_i64() > Some(most)) {
            return Err(format!("{at}: {value} is more than {}", schema["maximum"]));
        }
        if schema["enum"].as_array().is_some_and(|all| !all.contains(value)) {
            return Err(format!("{at}: {value} is none of {}", schema["enum"]));
        }
        Ok(())
    }

    fn check_object(&self, schema: &Value, object: &Map<String, Value>, at: &str) -> Result<(), String> {
        for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(required) {
                return Err(format!("{at}: {required} is missing"));
            }
        }
        for (name, value) in object {
            match (&schema["properties"][name], &schema["additionalProperties"]) {
                (Value::Null, Value::Bool(true)) => {}
                (Value::Null, Value::Null) => return Err(format!("{at}: {name} is not defined")),
                (Value::Null, others) => self.check(others, value, &format!("{at}.{name}"))?,
                (property, _) => self.check(property, value, &format!("{at}.{name}"))?,
            }
        }
        Ok(())
    }

    /// A document that is what its schema says. What is not required may be absent or null, as Firecracker has it, and
    /// there may be more than the schema knows, as a later Firecracker has it.
    pub fn example(&self, schema: &Value, choose: &mut Choose<'_>) -> Value {
        let schema = self.resolve(schema);
        if let Some(all) = schema["enum"].as_array() {
            return all[choose(all.len())].clone();
        }
        match schema["type"].as_str() {
            Some("object") => {
                let mut object = Map::new();
                let required = schema["required"].as_array().cloned().unwrap_or_default();
                for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                    match choose(4) {
                        _ if required.contains(&name.as_str().into()) => drop(object.insert(name.clone(), self.example(property, choose))),
                        0 => {}
                        // Lists are empty instead.
                        1 if self.resolve(property)["type"] != "array" => drop(object.insert(name.clone(), Value::Null)),
                        _ => drop(object.insert(name.clone(), self.example(property, choose))),
                    }
                }
                if schema["additionalProperties"].is_null() && choose(2) == 0 {
                    object.insert("from_a_later_version".into(), Value::from(vec![1]));
                }
                Value::Object(object)
            }
            Some("array") => (0..choose(3)).map(|_| self.example(&schema["items"], choose)).collect(),
            // Letters and digits are a name, too.
            Some("string") => ["a", "x1", "Q".repeat(40).as_str()][choose(3)].into(),
            Some("boolean") => (choose(2) == 0).into(),
            Some("integer") => {
                let least = schema["minimum"].as_i64().unwrap_or(0);
                let most = schema["maximum"].as_i64().unwrap_or(if schema["format"] == "int64" { i64::MAX } else { 60_000 });
                [least, least + 1, most][choose(3)].into()
            }
            other => panic!("schemas of type {other:?} are not known here"),
        }
    }

    pub fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(link) => {
                let target = self.0.pointer(link.strip_prefix('#').expect("within the document")).expect("what is linked is there");
                self.resolve(target)
            }
            None => schema,
        }
    }
}

fn fits(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), path.split('/').collect());
    pattern.len() == path.len() && pattern.iter().zip(path).all(|(p, got)| *p == got || p.starts_with('{') && !got.is_empty())
}

fn as_object(value: &Value) -> &Map<String, Value> {
    value.as_object().expect("an object")
}
