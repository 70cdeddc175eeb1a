//! What people and machines see: tables and JSON, from rows that know nothing of where they come from.

use std::io::{self, Write};

use mvm_types::Role;
use serde::Serialize;

/// How a listing is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OutputFormat {
    /// The columns that matter most.
    #[default]
    Table,
    /// All columns.
    Wide,
    /// JSON, for programs.
    Json,
}

/// A kind of row.
pub trait Row: Serialize {
    /// The columns: name, and whether it is shown only in the wide table.
    const COLUMNS: &'static [(&'static str, Width)];

    /// The cells, one for each column.
    fn cells(&self) -> Vec<String>;
}

/// In which table a column is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// In both.
    Narrow,
    /// Only in the wide one.
    Wide,
}

/// Writes rows to standard output.
pub fn print_rows<R: Row>(rows: &[R], format: OutputFormat) -> io::Result<()> {
    let text = match format {
        OutputFormat::Json => to_json(rows)?,
        OutputFormat::Table | OutputFormat::Wide => table(rows, format),
    };
    write_out(&text)
}

/// Writes one object to standard output: JSON, or a line for each of its fields.
pub fn print_info<R: Serialize>(info: &R, lines: &[(&str, String)], format: OutputFormat) -> io::Result<()> {
    if format == OutputFormat::Json {
        return write_out(&to_json(info)?);
    }
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    let text: String = lines.iter().map(|(name, value)| format!("{:width$}{}\n", format!("{name}:"), plain(value))).collect();
    write_out(&text)
}

/// One line without what a terminal obeys, whatever a guest or a log had to say.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Writes to standard output; a reader that has gone away, as `head` does, is no error.
pub fn write_out(text: &str) -> io::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Formats a value as JSON with a newline.
pub fn to_json<T: Serialize + ?Sized>(value: &T) -> io::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Formats rows as a table without lines, which `awk` and people read.
pub fn table<R: Row>(rows: &[R], format: OutputFormat) -> String {
    let shown: Vec<usize> =
        (0..R::COLUMNS.len()).filter(|index| format == OutputFormat::Wide || R::COLUMNS[*index].1 == Width::Narrow).collect();
    let header = shown.iter().map(|index| R::COLUMNS[*index].0.to_owned()).collect();
    let rows = rows.iter().map(|row| {
        let mut cells = row.cells();
        shown.iter().map(|index| std::mem::take(&mut cells[*index])).collect()
    });
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..shown.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let begin = text.len();
        for (cell, width) in line.iter().zip(&widths) {
            text.push_str(&plain(cell));
            text.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.truncate(begin + text[begin..].trim_end().len());
        text.push('\n');
    }
    text
}

/// `mvm tenant list`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct TenantRow {
    pub tenant: String,
    pub net_id: u16,
    pub subnet: String,
    pub pools: usize,
    pub instances: usize,
    pub running: usize,
    pub secrets_epoch: u64,
}

impl Row for TenantRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("TENANT", Width::Narrow),
        ("NET", Width::Narrow),
        ("SUBNET", Width::Narrow),
        ("POOLS", Width::Narrow),
        ("INSTANCES", Width::Narrow),
        ("RUNNING", Width::Narrow),
        ("SECRETS-EPOCH", Width::Wide),
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.tenant.clone(),
            self.net_id.to_string(),
            self.subnet.clone(),
            self.pools.to_string(),
            self.instances.to_string(),
            self.running.to_string(),
            self.secrets_epoch.to_string(),
        ]
    }
}

/// `mvm pool revisions`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct RevisionRow {
    pub revision: String,
    pub current: bool,
    pub instances: usize,
    pub built: String,
    pub size: u64,
    pub took_ms: u64,
    pub builder: Option<String>,
    pub attribute: Option<String>,
    pub locked: String,
    pub store_path: Option<String>,
    pub closure_hash: Option<String>,
    pub files: std::collections::BTreeMap<String, String>,
    pub usable: bool,
}

impl Row for RevisionRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("REVISION", Width::Narrow),
        ("CURRENT", Width::Narrow),
        ("INSTANCES", Width::Narrow),
        ("BUILT", Width::Narrow),
        ("MIB", Width::Narrow),
        ("ATTRIBUTE", Width::Narrow),
        ("SECONDS", Width::Wide),
        ("BUILDER", Width::Wide),
        ("USABLE", Width::Wide),
        ("FLAKE", Width::Wide),
        ("STORE-PATH", Width::Wide),
        ("CLOSURE", Width::Wide),
        ("FILES", Width::Wide),
    ];
    fn cells(&self) -> Vec<String> {
        let short = |hash: &str| hash.chars().take(16).collect::<String>();
        vec![
            self.revision.clone(),
            if self.current { "yes" } else { "" }.to_owned(),
            self.instances.to_string(),
            self.built.clone(),
            format!("{:.1}", self.size as f64 / f64::from(1 << 20)),
            self.attribute.clone().unwrap_or_else(|| "-".to_owned()),
            format!("{:.2}", self.took_ms as f64 / 1000.0),
            self.builder.clone().unwrap_or_else(|| "-".to_owned()),
            if self.usable { "yes" } else { "no" }.to_owned(),
            self.locked.clone(),
            self.store_path.clone().unwrap_or_else(|| "-".to_owned()),
            self.closure_hash.as_deref().map_or_else(|| "-".to_owned(), short),
            self.files.iter().map(|(name, hash)| format!("{name}={}", short(hash))).collect::<Vec<_>>().join(" "),
        ]
    }
}

/// `mvm pool diff`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct DifferenceRow {
    pub what: String,
    pub from: Option<String>,
    pub to: Option<String>,
}

impl Row for DifferenceRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[("WHAT", Width::Narrow), ("FROM", Width::Narrow), ("TO", Width::Narrow)];
    fn cells(&self) -> Vec<String> {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        vec![self.what.clone(), shown(&self.from), shown(&self.to)]
    }
}

/// `mvm pool gc` and `mvm node gc`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct CollectedRow {
    pub kind: String,
    pub name: String,
    pub pool: Option<String>,
    pub size: u64,
    pub why: String,
}

impl Row for CollectedRow {
    const COLUMNS: &'static [(&'static str, Width)] =
        &[("REMOVED", Width::Narrow), ("NAME", Width::Narrow), ("POOL", Width::Narrow), ("MIB", Width::Narrow), ("WHY", Width::Wide)];
    fn cells(&self) -> Vec<String> {
        vec![
            self.kind.clone(),
            self.name.clone(),
            self.pool.clone().unwrap_or_else(|| "-".to_owned()),
            format!("{:.1}", self.size as f64 / f64::from(1 << 20)),
            self.why.clone(),
        ]
    }
}

/// `mvm pool list` and the pools of `mvm status`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct PoolRow {
    pub pool: String,
    pub role: Role,
    pub profile: String,
    pub running: String,
    pub warm: String,
    pub sleeping: String,
    pub other: usize,
    pub vcpus: u8,
    pub mem_mib: u32,
    pub data_disk_mib: u64,
    pub revision: Option<String>,
    pub problem: Option<String>,
}

impl Row for PoolRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("POOL", Width::Narrow),
        ("ROLE", Width::Narrow),
        ("PROFILE", Width::Wide),
        ("RUNNING", Width::Narrow),
        ("WARM", Width::Narrow),
        ("SLEEPING", Width::Narrow),
        ("OTHER", Width::Narrow),
        ("VCPUS", Width::Wide),
        ("MEM-MIB", Width::Wide),
        ("DISK-MIB", Width::Wide),
        ("REVISION", Width::Wide),
        ("PROBLEM", Width::Narrow),
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.pool.clone(),
            self.role.to_string(),
            self.profile.clone(),
            self.running.clone(),
            self.warm.clone(),
            self.sleeping.clone(),
            self.other.to_string(),
            self.vcpus.to_string(),
            self.mem_mib.to_string(),
            self.data_disk_mib.to_string(),
            self.revision.clone().unwrap_or_else(|| "-".into()),
            self.problem.clone().unwrap_or_default(),
        ]
    }
}

/// `mvm pool info`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct PoolInfo<S: Serialize> {
    #[serde(flatten)]
    pub row: PoolRow,
    pub config_version: u64,
    pub created: String,
    pub spec: S,
}

/// `mvm instance list` and the instances of `mvm status`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct InstanceRow {
    pub instance: String,
    pub role: Role,
    pub state: String,
    pub address: String,
    /// Seconds in this state, where it is known.
    pub for_seconds: Option<u64>,
    pub pid: Option<i32>,
    pub mem_mib: u32,
    pub profile: String,
    pub config_version: u64,
    pub secrets_epoch: u64,
    pub revision: Option<String>,
    pub problem: Option<String>,
}

impl Row for InstanceRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("INSTANCE", Width::Narrow),
        ("ROLE", Width::Narrow),
        ("STATE", Width::Narrow),
        ("ADDRESS", Width::Narrow),
        ("FOR", Width::Narrow),
        ("PID", Width::Wide),
        ("MEM-MIB", Width::Wide),
        ("PROFILE", Width::Wide),
        ("CONFIG", Width::Wide),
        ("SECRETS", Width::Wide),
        ("REVISION", Width::Wide),
        ("PROBLEM", Width::Narrow),
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.instance.clone(),
            self.role.to_string(),
            self.state.clone(),
            self.address.clone(),
            self.for_seconds.map(seconds).unwrap_or_else(|| "-".into()),
            self.pid.map(|pid| pid.to_string()).unwrap_or_else(|| "-".into()),
            self.mem_mib.to_string(),
            self.profile.clone(),
            self.config_version.to_string(),
            self.secrets_epoch.to_string(),
            self.revision.clone().unwrap_or_else(|| "-".into()),
            self.problem.clone().unwrap_or_default(),
        ]
    }
}

/// Formats a span the way `kubectl` does: `45s`, `12m`, `5h`, `3d`.
pub fn seconds(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A row of two or three free columns: checks, secrets, steps.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct StepRow {
    pub step: usize,
    pub action: String,
    pub object: String,
    pub why: String,
    pub after: Vec<usize>,
}

impl Row for StepRow {
    const COLUMNS: &'static [(&'static str, Width)] =
        &[("STEP", Width::Narrow), ("ACTION", Width::Narrow), ("OBJECT", Width::Narrow), ("WHY", Width::Narrow), ("AFTER", Width::Wide)];
    fn cells(&self) -> Vec<String> {
        let after: Vec<String> = self.after.iter().map(ToString::to_string).collect();
        vec![self.step.to_string(), self.action.clone(), self.object.clone(), self.why.clone(), after.join(",")]
    }
}

/// One thing that was looked at: `mvm doctor`, `mvm net verify`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct CheckRow {
    pub check: String,
    /// Whether nothing has to be mended.
    pub ok: bool,
    pub found: String,
    /// How to mend it.
    pub remedy: Option<String>,
}

impl Row for CheckRow {
    const COLUMNS: &'static [(&'static str, Width)] =
        &[("CHECK", Width::Narrow), ("RESULT", Width::Narrow), ("FOUND", Width::Narrow), ("REMEDY", Width::Narrow)];
    fn cells(&self) -> Vec<String> {
        vec![
            self.check.clone(),
            match (self.ok, &self.remedy) {
                (true, None) => "ok".into(),
                // It works as it is, and could be better.
                (true, Some(_)) => "hint".into(),
                (false, _) => "WRONG".into(),
            },
            self.found.clone(),
            self.remedy.clone().unwrap_or_default(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_no_lines_and_no_trailing_spaces() {
        let rows = [CheckRow { check: "tun".into(), ok: true, found: "/dev/net/tun opens".into(), remedy: None }];
        assert_eq!(table(&rows, OutputFormat::Table), "CHECK  RESULT  FOUND               REMEDY\ntun    ok      /dev/net/tun opens\n");
    }

    #[test]
    fn a_cell_moves_no_cursor_and_has_one_line() {
        let rows = [CheckRow { check: "a\u{1b}[2Jb".into(), ok: true, found: "1\r\n2\t3\u{9b}4".into(), remedy: None }];
        assert_eq!(table(&rows, OutputFormat::Table), "CHECK   RESULT  FOUND     REMEDY\na [2Jb  ok      1  2 3 4\n");
    }

    #[test]
    fn spans_are_short() {
        assert_eq!([5, 119, 120, 7_200, 172_800].map(seconds), ["5s", "119s", "2m", "2h", "2d"]);
    }
}
