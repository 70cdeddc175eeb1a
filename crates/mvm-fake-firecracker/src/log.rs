//! The log: standard output until it is told otherwise, as Firecracker's.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Lines with time, id and thread.
#[derive(Clone, Debug)]
pub struct Log(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    id: String,
    file: Option<File>,
}

impl Default for Log {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Inner { id: "anonymous-instance".into(), file: None })))
    }
}

impl Log {
    pub fn name(&self, id: &str) {
        self.inner().id = id.into();
    }

    pub fn redirect(&self, path: &Path) -> std::io::Result<()> {
        self.inner().file = Some(open_output(path)?);
        Ok(())
    }

    /// What cannot be written is lost, as there.
    pub fn line(&self, thread: &str, text: &str) {
        let mut inner = self.inner();
        let line = format!("{} [{}:{thread}] {text}\n", now(), inner.id);
        let _ = match &mut inner.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => std::io::stdout().write_all(line.as_bytes()),
        };
    }

    /// The last line.
    pub fn exit(&self, code: u8) -> ExitCode {
        let how = if code == 0 { "successfully" } else { "with error" };
        self.line("main", &format!("Firecracker exiting {how}. exit_code={code}"));
        ExitCode::from(code)
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A log or console: neither truncated nor appended to, and not waited for when it is a pipe.
pub fn open_output(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK).open(path)
}

/// `2026-11-24T11:22:46.323698456`, in UTC.
fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Howard Hinnant's civil_from_days, for days after 1970.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}", since.subsec_nanos())
}
