//! From text to a validated document, with the place of whatever is wrong.

use std::path::Path;

use mvm_types::nearest;
use serde_json::Value;

use super::validate::validate;
use super::{DesiredState, InvalidDocument, MAX_DOCUMENT, Problem, json_schema};

/// How a document is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// TOML.
    Toml,
}

impl Format {
    /// Tells the format by the file's name, else by its first character: JSON documents begin with `{`.
    pub fn of(path: &Path, text: &str) -> Format {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Format::Json,
            Some("toml") => Format::Toml,
            _ if text.trim_start().starts_with('{') => Format::Json,
            _ => Format::Toml,
        }
    }
}

/// Parses and validates a document.
///
/// # Errors
/// Every problem found: the first syntax or type error, else all unknown fields, else all that makes no sense.
pub fn parse(text: &str, format: Format) -> Result<DesiredState, InvalidDocument> {
    if text.len() > MAX_DOCUMENT {
        return one("", format!("the document has {} bytes; at most {MAX_DOCUMENT} are read", text.len()));
    }
    let value: Value = match format {
        Format::Json => serde_json::from_str(text).or_else(|error| one("", format!("not JSON: {error}")))?,
        Format::Toml => toml::from_str(text).or_else(|error| one("", format!("not TOML: {}", error.to_string().trim_end())))?,
    };
    let mut problems = Vec::new();
    let schema = json_schema();
    unknown_fields(&value, &schema, &schema, &mut String::new(), &mut problems);
    if !problems.is_empty() {
        return Err(InvalidDocument { problems });
    }
    // Once more from the text: a field given twice is an error only there.
    let desired: DesiredState = match format {
        Format::Json => serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
            .or_else(|error| one(&place(error.path()), error.inner().to_string()))?,
        Format::Toml => {
            let deserializer = toml::Deserializer::parse(text).or_else(|error| one("", error.to_string()))?;
            serde_path_to_error::deserialize(deserializer).or_else(|error| one(&place(error.path()), error.inner().message().to_owned()))?
        }
    };
    let problems = validate(&desired);
    if problems.is_empty() { Ok(desired) } else { Err(InvalidDocument { problems }) }
}

fn one<T>(place: &str, what: String) -> Result<T, InvalidDocument> {
    Err(InvalidDocument { problems: vec![Problem::new(place.to_owned(), what)] })
}

fn place(path: &serde_path_to_error::Path) -> String {
    let text = path.to_string();
    if text == "." { String::new() } else { text }
}

/// Walks the document along its schema and reports the fields that the schema does not know.
fn unknown_fields(value: &Value, schema: &Value, root: &Value, path: &mut String, problems: &mut Vec<Problem>) {
    const MOST: usize = 20;
    let schema = resolve(schema, root);
    match value {
        Value::Object(fields) => {
            let Some(known) = schema["properties"].as_object() else { return };
            for (name, inner) in fields {
                if problems.len() >= MOST {
                    return;
                }
                let length = path.len();
                if !path.is_empty() {
                    path.push('.');
                }
                path.extend(name.chars().take(64));
                match known.get(name) {
                    Some(schema) => unknown_fields(inner, schema, root, path, problems),
                    None => problems.push(Problem::new(path.clone(), unknown(name, known))),
                }
                path.truncate(length);
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                let length = path.len();
                path.push_str(&format!("[{index}]"));
                unknown_fields(inner, &schema["items"], root, path, problems);
                path.truncate(length);
            }
        }
        _ => {}
    }
}

fn unknown(name: &str, known: &serde_json::Map<String, Value>) -> String {
    match nearest(name, known.keys().map(String::as_str)) {
        Some(nearest) => format!("unknown field; did you mean {nearest}?"),
        None => format!("unknown field; known here: {}", known.keys().cloned().collect::<Vec<_>>().join(", ")),
    }
}

/// Follows a reference, and the one alternative of an optional field that is not null.
fn resolve<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    if let Some(name) = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        return resolve(&root["$defs"][name], root);
    }
    match schema["anyOf"].as_array() {
        Some(alternatives) => alternatives.iter().find(|one| one["type"] != "null").map_or(schema, |one| resolve(one, root)),
        None => schema,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLEET: &str = include_str!("../../../examples/quickstart.toml");

    fn problem(text: &str) -> String {
        parse(text, Format::of(Path::new("x"), text)).unwrap_err().to_string()
    }

    #[test]
    fn both_formats_say_the_same() {
        let from_toml = parse(FLEET, Format::Toml).unwrap();
        let json = serde_json::to_string_pretty(&from_toml).unwrap();
        assert_eq!(parse(&json, Format::Json).unwrap(), from_toml);
        let toml = toml::to_string(&from_toml).unwrap();
        assert_eq!(parse(&toml, Format::Toml).unwrap(), from_toml);
    }

    #[test]
    fn unknown_fields_name_the_nearest() {
        let text = FLEET.replacen("role =", "roll =", 1).replacen("vcpus", "cpus", 1);
        let problem = problem(&text);
        assert!(problem.contains("tenants[0].pools[0].roll: unknown field; did you mean role?"), "{problem}");
        assert!(problem.contains("instance_resources.cpus: unknown field; did you mean vcpus?"), "{problem}");
    }

    #[test]
    fn wrong_values_name_their_place() {
        for (from, to, expected) in [
            (
                "\"gateway\"",
                "\"gatway\"",
                "tenants[0].pools[0].role: \"gatway\" is not a role; roles are gateway, builder, worker, capability-imessage (did you mean gateway?)",
            ),
            ("running = 2", "running = -1", "tenants[0].pools[1].desired_counts.running: invalid value: integer `-1`"),
            ("running = 2", "running = 99999999999", "tenants[0].pools[1].desired_counts.running: invalid value"),
            ("running = 2", "running = \"two\"", "tenants[0].pools[1].desired_counts.running: invalid type: string"),
            ("\"10.240.1.0/24\"", "\"10.240.1.0/33\"", "tenants[0].network.ipv4_subnet: "),
            ("tenant_id = \"demo\"", "tenant_id = \"../demo\"", "tenants[0].tenant_id: tenant id \"../demo\" has '.' at position 1"),
            ("tenant_net_id = 1", "tenant_net_id = 4096", "tenants[0].network.tenant_net_id: tenant net id 4096 is out of range"),
            ("\"10.240.1.0/24\"", "\"10.240.1.5/24\"", "tenants[0].network.ipv4_subnet: subnet 10.240.1.5/24 has host bits set"),
            ("schema_version = 1", "schema_version = 2", "schema_version: this mvm reads version 1"),
        ] {
            assert!(FLEET.contains(from), "{from}");
            let problem = problem(&FLEET.replacen(from, to, 1));
            assert!(problem.starts_with(expected), "{problem}");
        }
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        let json = r#"{"schema_version": 1, "schema_version": 1}"#;
        assert!(problem(json).contains("duplicate field `schema_version`"));
    }

    #[test]
    fn a_document_cut_at_any_byte_is_refused_or_whole() {
        let json = serde_json::to_string(&parse(FLEET, Format::Toml).unwrap()).unwrap();
        for cut in 0..json.len() {
            assert!(parse(&json[..cut], Format::Json).is_err(), "{cut}");
        }
        // TOML has no end mark: what is cut between two tables is whole. It must only never panic.
        for cut in (0..FLEET.len()).filter(|cut| FLEET.is_char_boundary(*cut)) {
            let _ = parse(&FLEET[..cut], Format::Toml);
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,200}") {
            let _ = parse(&text, Format::Json);
            let _ = parse(&text, Format::Toml);
        }

        #[test]
        fn hostile_ids_are_refused_with_their_place(id in "[^a-z]\\PC{0,20}") {
            let text = serde_json::json!({"schema_version": 1, "tenants": [{"tenant_id": id,
                "network": {"tenant_net_id": 1, "ipv4_subnet": "10.240.1.0/24"}}]}).to_string();
            let problem = problem(&text);
            prop_assert!(problem.starts_with("tenants[0].tenant_id: "), "{}", problem);
        }
    }
}
