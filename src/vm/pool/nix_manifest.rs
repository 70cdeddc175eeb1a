//! `mvm-profiles.toml`: which NixOS modules a flake has for each role and profile, and what its roles mean.
//!
//! ```toml
//! [meta]
//! version = 1
//!
//! [profiles.minimal]
//! module = "guests/profiles/minimal.nix"
//!
//! [roles.cache]
//! module = "roles/cache.nix"
//! requires_secrets_drive = true
//! priority = 1
//! ports = [{ port = 6379 }]
//! services = ["redis.service", { unit = "sync.service", secrets = ["sync-token"] }]
//! ```
//!
//! The modules are Nix's business (the flake reads the same file); what is read here is what a role means to mvm. A role that mvm does not
//! know exists where a manifest defines it; for mvm's own roles, what the manifest leaves out is as without one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::path::{Component, Path};

use mvm_hostd::HostdError;
use mvm_hostd::dir::Dir;
use mvm_types::{ProfileName, Role, RoleError, SecretName, nearest};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use toml::Spanned;

use super::role::{Handler, MAX_PRIORITY, Port, Ports, RoleTraits, Service};
use crate::vm::error::with_causes;

/// The manifest's name, at the root of a flake.
pub const MANIFEST_FILE: &str = "mvm-profiles.toml";
/// The version that is read.
const VERSION: i64 = 1;
/// The largest manifest that is read, in bytes.
const MOST: usize = 256 << 10;

/// Why a manifest, or what is asked of it, was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// It is not what a manifest is.
    #[error("{MANIFEST_FILE}:{line}:{column}: {what}")]
    Invalid {
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// What is wrong and what would be right.
        what: String,
    },
    /// It could not be read.
    #[error("{MANIFEST_FILE} cannot be read: {0}")]
    Unreadable(String),
    /// A module that it names cannot be used.
    #[error("{MANIFEST_FILE}:{line}:{column}: {place}: {why}")]
    Module {
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// Which one, as in `roles.gateway.module`.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// There is none, and the role is none of mvm's own.
    #[error("{}, and the flake has no manifest that defines it", RoleError::unknown(*.role))]
    Missing {
        /// The role.
        role: Role,
    },
    /// It has no such role or profile.
    #[error("{kind} \"{name}\" is not in {MANIFEST_FILE}; it has: {known}{}", .near.as_ref().map(|near| format!(" (did you mean {near}?)")).unwrap_or_default())]
    Unknown {
        /// `role` or `profile`.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// What there is, separated by commas.
        known: String,
        /// The one that was most likely meant.
        near: Option<String>,
    },
}

/// A manifest that is right in itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NixManifest {
    /// The profiles, by name.
    pub profiles: BTreeMap<ProfileName, ProfileEntry>,
    /// The roles, by name.
    pub roles: BTreeMap<Role, RoleEntry>,
}

/// A profile of a flake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileEntry {
    /// Its NixOS module, relative to the flake.
    pub module: String,
}

/// A role of a flake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleEntry {
    /// Its NixOS module, relative to the flake.
    pub module: String,
    /// What it means.
    pub traits: RoleTraits,
}

/// What a role and a profile come to in a flake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The role's module, relative to the flake.
    pub role_module: String,
    /// The profile's module, relative to the flake.
    pub profile_module: String,
    /// The name of the image below `packages.<system>`.
    pub attribute: String,
}

/// The file as it stands.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    meta: RawMeta,
    #[serde(default)]
    profiles: BTreeMap<Spanned<String>, RawProfile>,
    #[serde(default)]
    roles: BTreeMap<Spanned<String>, RawRole>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawMeta {
    version: Spanned<i64>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawProfile {
    module: Spanned<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawRole {
    module: Spanned<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requires_config_drive: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requires_secrets_drive: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    priority: Option<Spanned<u16>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_running: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_running_seconds: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ports: Option<Vec<Spanned<Port>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    services: Option<Vec<Spanned<RawService>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vsock_handlers: Option<BTreeSet<Handler>>,
}

/// A service: its unit, or its unit and the secrets that it needs.
#[derive(Clone, Serialize)]
#[serde(untagged)]
enum RawService {
    Unit(String),
    Table(RawServiceTable),
}

impl<'de> Deserialize<'de> for RawService {
    // By hand, so that what is wrong in a table is said of the key and not of the whole.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RawService;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("the name of a systemd unit, or { unit = \"…\", secrets = [\"…\"] }")
            }

            fn visit_str<E: serde::de::Error>(self, unit: &str) -> Result<RawService, E> {
                Ok(RawService::Unit(unit.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawService, A::Error> {
                RawServiceTable::deserialize(MapAccessDeserializer::new(map)).map(RawService::Table)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawServiceTable {
    unit: String,
    #[serde(default)]
    secrets: Vec<SecretName>,
}

/// A module that a manifest names: where it says so, what for, and which.
struct Named {
    offset: usize,
    place: String,
    module: String,
}

/// The line and the column of an offset, counted from 1; the column in characters.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(offset.min(text.len()))];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// What a parser says, with the key that was most likely meant.
fn with_nearest(message: &str) -> String {
    let message = message.trim_end();
    let words: Vec<&str> = message.split('`').collect();
    // unknown field `x`, expected one of `a`, `b`
    let near = match words[..] {
        ["unknown field " | "unknown variant ", given, ref known @ ..] => nearest(given, known.iter().copied().skip(1).step_by(2)),
        _ => None,
    };
    near.map_or_else(|| message.to_owned(), |near| format!("{message} (did you mean {near}?)"))
}

impl NixManifest {
    /// Reads and checks a manifest's text.
    ///
    /// # Errors
    /// What is wrong first, with its line and column.
    pub fn parse(text: &str) -> Result<NixManifest, ManifestError> {
        Self::read(text).map(|(manifest, _)| manifest)
    }

    fn read(text: &str) -> Result<(NixManifest, Vec<Named>), ManifestError> {
        let at = |offset: usize, what: String| {
            let (line, column) = position(text, offset);
            ManifestError::Invalid { line, column, what }
        };
        if text.len() > MOST {
            return Err(at(0, format!("it has more than {MOST} bytes")));
        }
        // The version first: what a newer one has besides is not wrong.
        #[derive(Deserialize)]
        struct Versioned {
            meta: Option<Meta>,
        }
        #[derive(Deserialize)]
        struct Meta {
            version: Option<Spanned<i64>>,
        }
        let wrong = |error: toml::de::Error| at(error.span().map_or(0, |span| span.start), with_nearest(error.message()));
        let versioned: Versioned = toml::from_str(text).map_err(wrong)?;
        let Some(version) = versioned.meta.and_then(|meta| meta.version) else {
            return Err(at(0, format!("it has no version; write [meta] and version = {VERSION}")));
        };
        if *version.get_ref() != VERSION {
            let what = format!("it has version {}, and this mvm reads version {VERSION}", version.get_ref());
            return Err(at(version.span().start, what));
        }
        let raw: Raw = toml::from_str(text).map_err(wrong)?;
        let mut manifest = NixManifest { profiles: BTreeMap::new(), roles: BTreeMap::new() };
        let mut modules = Vec::new();
        let mut note = |kind: &str, name: &str, module: &Spanned<String>| {
            let place = format!("{kind}.{name}.module");
            modules.push(Named { offset: module.span().start, place, module: module.get_ref().clone() });
        };
        for (name, profile) in raw.profiles {
            let parsed = name.get_ref().parse::<ProfileName>().map_err(|error| at(name.span().start, error.to_string()))?;
            note("profiles", parsed.as_str(), &profile.module);
            manifest.profiles.insert(parsed, ProfileEntry { module: module(&profile.module, at)? });
        }
        for (name, role) in raw.roles {
            let parsed = name.get_ref().parse::<Role>().map_err(|error| at(name.span().start, error.to_string()))?;
            note("roles", parsed.as_str(), &role.module);
            let module = module(&role.module, at)?;
            manifest.roles.insert(parsed, RoleEntry { module, traits: traits(parsed, role, at)? });
        }
        Ok((manifest, modules))
    }

    /// Reads the manifest of a flake that lies in a directory; `None` when it has none.
    ///
    /// Guarantees: no symbolic link leads out of the flake, neither to the manifest nor to a module that it names, and every module is there.
    ///
    /// # Errors
    /// When there is one and it cannot be used.
    pub fn load(flake: &Path) -> Result<Option<NixManifest>, ManifestError> {
        // Where the sources lie meanwhile is not what the reader calls them.
        let cause = |error: HostdError| match error {
            HostdError::Io { source, .. } => source.to_string(),
            HostdError::Refused { why, .. } => why,
        };
        let dir = Dir::open(flake).map_err(|error| ManifestError::Unreadable(with_causes(&error)))?;
        let found = dir.open_inside(MANIFEST_FILE).map_err(|error| ManifestError::Unreadable(cause(error)))?;
        let Some(file) = found else { return Ok(None) };
        let mut bytes = Vec::new();
        // One byte more than is allowed tells that it is too long.
        file.take(MOST as u64 + 1).read_to_end(&mut bytes).map_err(|error| ManifestError::Unreadable(error.to_string()))?;
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(error) => {
                let good = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
                let (line, column) = position(&good, good.len());
                let what = format!("it is not UTF-8: there is a byte 0x{:02x}", bytes[error.valid_up_to()]);
                return Err(ManifestError::Invalid { line, column, what });
            }
        };
        let (manifest, modules) = NixManifest::read(text)?;
        for Named { offset, place, module } in modules {
            let why = match dir.open_inside(&module) {
                Ok(Some(_)) => continue,
                Ok(None) => format!("{module} is not in the flake"),
                Err(error) => format!("{module}: {}", cause(error)),
            };
            let (line, column) = position(text, offset);
            return Err(ManifestError::Module { line, column, place, why });
        }
        Ok(Some(manifest))
    }

    /// Finds what a role and a profile come to.
    ///
    /// # Errors
    /// When one is not in the manifest, with what is.
    pub fn resolve(&self, role: Role, profile: &ProfileName) -> Result<Resolved, ManifestError> {
        let role_entry = self.roles.get(&role).ok_or_else(|| unknown("role", role.as_str(), self.roles.keys().map(Role::as_str)))?;
        let profile_entry = self
            .profiles
            .get(profile)
            .ok_or_else(|| unknown("profile", profile.as_str(), self.profiles.keys().map(ProfileName::as_str)))?;
        Ok(Resolved {
            role_module: role_entry.module.clone(),
            profile_module: profile_entry.module.clone(),
            attribute: format!("tenant-{role}-{profile}"),
        })
    }

    /// What a role of the manifest means.
    ///
    /// # Errors
    /// When it is not in the manifest, with what is.
    pub fn role_requirements(&self, role: Role) -> Result<&RoleTraits, ManifestError> {
        let entry = self.roles.get(&role).ok_or_else(|| unknown("role", role.as_str(), self.roles.keys().map(Role::as_str)))?;
        Ok(&entry.traits)
    }

    /// Writes the manifest; what it reads back as is the same.
    pub fn to_toml(&self) -> String {
        let unspanned = |text: &str| Spanned::new(0..0, text.to_owned());
        let profiles =
            self.profiles.iter().map(|(name, entry)| (unspanned(name.as_str()), RawProfile { module: unspanned(&entry.module) }));
        let roles = self.roles.iter().map(|(name, entry)| {
            let traits = &entry.traits;
            let raw = RawRole {
                module: unspanned(&entry.module),
                requires_config_drive: Some(traits.requires_config_drive),
                requires_secrets_drive: Some(traits.requires_secrets_drive),
                priority: Some(Spanned::new(0..0, traits.priority)),
                min_running: Some(traits.min_running),
                min_running_seconds: Some(traits.min_running_seconds),
                ports: match &traits.ports {
                    Ports::Any => None,
                    Ports::Only(ports) => Some(ports.iter().map(|port| Spanned::new(0..0, *port)).collect()),
                },
                services: Some(traits.services.iter().map(|service| Spanned::new(0..0, RawService::of(service))).collect()),
                vsock_handlers: Some(traits.vsock_handlers.clone()),
            };
            (unspanned(name.as_str()), raw)
        });
        let raw = Raw { meta: RawMeta { version: Spanned::new(0..0, VERSION) }, profiles: profiles.collect(), roles: roles.collect() };
        toml::to_string(&raw).expect("names, numbers and lists of them can be written as TOML")
    }
}

impl RawService {
    fn of(service: &Service) -> RawService {
        RawService::Table(RawServiceTable { unit: service.unit.clone(), secrets: service.secrets.clone() })
    }
}

fn unknown<'a>(kind: &'static str, name: &str, known: impl Iterator<Item = &'a str>) -> ManifestError {
    let known: Vec<&str> = known.collect();
    ManifestError::Unknown {
        kind,
        name: name.to_owned(),
        near: nearest(name, known.iter().copied()).map(str::to_owned),
        known: if known.is_empty() { "none".to_owned() } else { known.join(", ") },
    }
}

/// A module's path: relative, and not out of the flake.
fn module(path: &Spanned<String>, at: impl Fn(usize, String) -> ManifestError) -> Result<String, ManifestError> {
    let text = path.get_ref();
    let plain = !text.is_empty()
        && text.len() <= 255
        && !text.chars().any(char::is_control)
        && Path::new(text).components().all(|component| matches!(component, Component::Normal(_)));
    if plain {
        return Ok(text.clone());
    }
    let shown: String = text.chars().take(80).collect();
    Err(at(path.span().start, format!("module {shown:?} is not a path inside the flake; one looks like \"roles/gateway.nix\"")))
}

fn traits(role: Role, raw: RawRole, at: impl Fn(usize, String) -> ManifestError) -> Result<RoleTraits, ManifestError> {
    let built_in = RoleTraits::built_in(role);
    let priority = match raw.priority {
        None => built_in.priority,
        Some(priority) if *priority.get_ref() <= MAX_PRIORITY => *priority.get_ref(),
        Some(priority) => {
            return Err(at(priority.span().start, format!("priority {} is more than {MAX_PRIORITY}", priority.get_ref())));
        }
    };
    let ports = match raw.ports {
        None => built_in.ports,
        Some(ports) => {
            if let Some(zero) = ports.iter().find(|port| port.get_ref().port == 0) {
                return Err(at(zero.span().start, "port 0 is none; ports are 1 to 65535".to_owned()));
            }
            Ports::Only(ports.iter().map(|port| *port.get_ref()).collect())
        }
    };
    let mut services = Vec::new();
    for service in raw.services.unwrap_or_default() {
        let (unit, secrets) = match service.get_ref().clone() {
            RawService::Unit(unit) => (unit, Vec::new()),
            RawService::Table(table) => (table.unit, table.secrets),
        };
        if !is_unit(&unit) {
            let shown: String = unit.chars().take(80).collect();
            return Err(at(service.span().start, format!("{shown:?} is not the name of a systemd unit; one looks like \"nginx.service\"")));
        }
        services.push(Service { unit, secrets });
    }
    Ok(RoleTraits {
        priority,
        requires_config_drive: raw.requires_config_drive.unwrap_or(built_in.requires_config_drive),
        requires_secrets_drive: raw.requires_secrets_drive.unwrap_or(built_in.requires_secrets_drive),
        min_running: raw.min_running.unwrap_or(built_in.min_running),
        min_running_seconds: raw.min_running_seconds.unwrap_or(built_in.min_running_seconds),
        ports,
        services,
        vsock_handlers: raw.vsock_handlers.unwrap_or(built_in.vsock_handlers),
    })
}

/// As systemd.unit(5) has it, without templates' arguments that would need escaping.
fn is_unit(name: &str) -> bool {
    let kinds = [".service", ".socket", ".target", ".path", ".timer", ".mount"];
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-@:".contains(c);
    let stem = kinds.iter().find_map(|kind| name.strip_suffix(kind));
    name.len() <= 255 && name.chars().all(allowed) && stem.is_some_and(|stem| !stem.is_empty() && !stem.starts_with(['.', '-']))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::super::role::Protocol;
    use super::*;

    const WHOLE: &str = r#"
[meta]
version = 1

[profiles.minimal]
module = "guests/profiles/minimal.nix"
[profiles.python]
module = "guests/profiles/python.nix"

[roles.gateway]
module = "roles/gateway.nix"
requires_config_drive = true
requires_secrets_drive = true
min_running = 1

[roles.cache]
module = "roles/cache.nix"
requires_secrets_drive = true
priority = 1
min_running_seconds = 300
ports = [{ port = 6379 }, { port = 53, protocol = "udp" }]
services = ["redis.service", { unit = "sync.service", secrets = ["sync-token"] }]
vsock_handlers = ["logs"]
"#;

    fn refused(from: &str, to: &str) -> String {
        assert!(WHOLE.contains(from), "{from}");
        NixManifest::parse(&WHOLE.replacen(from, to, 1)).unwrap_err().to_string()
    }

    fn role(name: &str) -> Role {
        name.parse().unwrap()
    }

    #[test]
    fn a_manifest_reads_back() {
        let manifest = NixManifest::parse(WHOLE).unwrap();
        assert_eq!(NixManifest::parse(&manifest.to_toml()).unwrap(), manifest);
    }

    #[test]
    fn role_and_profile_resolve_to_modules_and_an_attribute() {
        let manifest = NixManifest::parse(WHOLE).unwrap();
        let resolved = manifest.resolve(role("cache"), &"python".parse().unwrap()).unwrap();
        assert_eq!(
            (resolved.role_module.as_str(), resolved.profile_module.as_str(), resolved.attribute.as_str()),
            ("roles/cache.nix", "guests/profiles/python.nix", "tenant-cache-python")
        );
        assert_eq!(
            manifest.resolve(Role::Gateway, &"pyhton".parse().unwrap()).unwrap_err().to_string(),
            "profile \"pyhton\" is not in mvm-profiles.toml; it has: minimal, python (did you mean python?)"
        );
        assert_eq!(
            manifest.resolve(Role::Worker, &"minimal".parse().unwrap()).unwrap_err().to_string(),
            "role \"worker\" is not in mvm-profiles.toml; it has: gateway, cache"
        );
    }

    #[test]
    fn a_role_means_what_the_manifest_says_and_else_what_it_always_means() {
        let manifest = NixManifest::parse(WHOLE).unwrap();
        let gateway = manifest.role_requirements(Role::Gateway).unwrap();
        assert_eq!(*gateway, RoleTraits { min_running: 1, ..RoleTraits::built_in(Role::Gateway) });
        let cache = manifest.role_requirements(role("cache")).unwrap();
        assert_eq!((cache.priority, cache.requires_config_drive, cache.requires_secrets_drive), (1, false, true));
        assert_eq!(cache.min_running_seconds, 300);
        assert!(cache.may_expose(Port { port: 53, protocol: Protocol::Udp }));
        assert!(!cache.may_expose(Port { port: 53, protocol: Protocol::Tcp }));
        assert_eq!(cache.services[1].secrets[0].as_str(), "sync-token");
        assert_eq!(cache.vsock_handlers, BTreeSet::from([Handler::Logs]));
        assert!(manifest.role_requirements(role("other")).is_err());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (from, to, expected) in [
            ("version = 1", "version = 2", "mvm-profiles.toml:3:11: it has version 2, and this mvm reads version 1"),
            ("version = 1", "version = \"1\"", "mvm-profiles.toml:3:11: invalid type: string \"1\", expected i64"),
            ("[meta]\nversion = 1", "", "mvm-profiles.toml:1:1: it has no version; write [meta] and version = 1"),
            ("min_running = 1", "min_runing = 1", "mvm-profiles.toml:14:1: unknown field `min_runing`"),
            ("[profiles.python]", "[profiles.Python]", "mvm-profiles.toml:7:11: profile \"Python\" has 'P' at position 1"),
            ("[roles.cache]", "[roles.\"../x\"]", "mvm-profiles.toml:16:8: role \"../x\" has '.' at position 1"),
            ("\"roles/cache.nix\"", "\"/etc/passwd\"", "mvm-profiles.toml:17:10: module \"/etc/passwd\" is not a path inside the flake"),
            ("\"roles/cache.nix\"", "\"roles/../../x.nix\"", "mvm-profiles.toml:17:10: module \"roles/../../x.nix\" is not"),
            ("\"roles/cache.nix\"", "\"\"", "mvm-profiles.toml:17:10: module \"\" is not"),
            ("\"roles/cache.nix\"", "7", "mvm-profiles.toml:17:10: invalid type: integer `7`, expected a string"),
            ("priority = 1", "priority = 1001", "mvm-profiles.toml:19:12: priority 1001 is more than 1000"),
            ("priority = 1", "priority = -1", "mvm-profiles.toml:19:12: invalid value: integer `-1`, expected u16"),
            ("port = 6379", "port = 0", "mvm-profiles.toml:21:10: port 0 is none"),
            (
                "secrets = [\"sync-token\"]",
                "secret = [\"sync-token\"]",
                "mvm-profiles.toml:22:55: unknown field `secret`, expected `unit` or `secrets` (did you mean secrets?)",
            ),
            ("[\"sync-token\"]", "\"sync-token\"", "mvm-profiles.toml:22:65: invalid type: string \"sync-token\", expected a sequence"),
            (
                "\"redis.service\"",
                "7",
                "mvm-profiles.toml:22:13: invalid type: integer `7`, expected the name of a systemd unit, or { unit = \"…\", secrets = [\"…\"] }",
            ),
            ("\"redis.service\"", "\"redis\"", "mvm-profiles.toml:22:13: \"redis\" is not the name of a systemd unit"),
            (
                "[\"logs\"]",
                "[\"lgos\"]",
                "mvm-profiles.toml:23:19: unknown variant `lgos`, expected one of `exec`, `shell`, `copy`, `logs`",
            ),
        ] {
            let said = refused(from, to);
            assert!(said.starts_with(expected), "{said}\n{expected}");
        }
        assert!(NixManifest::parse("").unwrap_err().to_string().contains("it has no version"));
        assert!(NixManifest::parse(&"#".repeat(MOST + 1)).unwrap_err().to_string().contains("it has more than 262144 bytes"));
    }

    #[test]
    fn a_manifest_cut_at_any_byte_never_panics() {
        for cut in 0..WHOLE.len() {
            let _ = NixManifest::parse(&WHOLE[..cut]);
        }
    }

    #[test]
    fn modules_are_in_the_flake_and_links_lead_nowhere_else() {
        let flake = tempfile::tempdir().unwrap();
        let path = flake.path();
        assert_eq!(NixManifest::load(path), Ok(None));
        fs::write(path.join(MANIFEST_FILE), "[meta]\nversion = 1\n[roles.cache]\nmodule = \"roles/cache.nix\"\n").unwrap();
        let said = |path: &Path| NixManifest::load(path).unwrap_err().to_string();
        assert_eq!(said(path), "mvm-profiles.toml:4:10: roles.cache.module: roles/cache.nix is not in the flake");
        fs::create_dir(path.join("roles")).unwrap();
        symlink("/etc/hostname", path.join("roles/cache.nix")).unwrap();
        assert_eq!(said(path), "mvm-profiles.toml:4:10: roles.cache.module: roles/cache.nix: a link leads out of the directory");
        fs::remove_file(path.join("roles/cache.nix")).unwrap();
        fs::create_dir(path.join("roles/cache.nix")).unwrap();
        assert_eq!(said(path), "mvm-profiles.toml:4:10: roles.cache.module: roles/cache.nix: it is no regular file");
        fs::remove_dir(path.join("roles/cache.nix")).unwrap();
        fs::write(path.join("roles/cache.nix"), "{ }").unwrap();
        assert!(NixManifest::load(path).unwrap().is_some());
        fs::rename(path.join(MANIFEST_FILE), path.join("kept")).unwrap();
        symlink("kept", path.join(MANIFEST_FILE)).unwrap();
        assert!(NixManifest::load(path).unwrap().is_some());
        fs::remove_file(path.join(MANIFEST_FILE)).unwrap();
        symlink("/etc/hostname", path.join(MANIFEST_FILE)).unwrap();
        assert_eq!(said(path), "mvm-profiles.toml cannot be read: a link leads out of the directory");
        fs::remove_file(path.join(MANIFEST_FILE)).unwrap();
        fs::write(path.join(MANIFEST_FILE), b"[meta]\nversion = 1 # \xc3\xa4 \xff").unwrap();
        assert_eq!(said(path), "mvm-profiles.toml:2:17: it is not UTF-8: there is a byte 0xff");
        assert!(NixManifest::load(&path.join("absent")).is_err());
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,200}") {
            let _ = NixManifest::parse(&text);
        }
    }
}
