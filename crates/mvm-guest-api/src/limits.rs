//! What either side accepts at most from the other.

/// Largest message, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Largest piece of a stream (standard output, tar, log), in bytes.
pub const CHUNK: usize = 64 << 10;
/// Most arguments of a command.
pub const MAX_ARGS: usize = 4096;
/// Most environment variables of a command.
pub const MAX_ENV: usize = 1024;
/// All arguments and variables of a command together, in bytes; the kernel's own limit is 2 MiB.
pub const MAX_ARG_BYTES: usize = 512 << 10;
/// Longest path or name in a request, in bytes (Linux `PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// Most commands at once in one guest.
pub const MAX_EXECS: usize = 64;
/// Most concurrent calls on one connection.
pub const MAX_STREAMS: u32 = 32;
/// Most entries in one tar stream.
pub const MAX_TAR_ENTRIES: u64 = 1_000_000;
/// Most bytes of file content in one tar stream (64 GiB).
pub const MAX_TAR_BYTES: u64 = 64 << 30;
/// What is kept of the output of the agent and of the workload, each, in bytes.
pub const LOG_RING: usize = 256 << 10;
/// Longest deadline or grace that is honoured, in milliseconds (one hour).
pub const MAX_DEADLINE_MS: u64 = 3_600_000;
/// Largest `config.json`, in bytes.
pub const MAX_CONFIG: u64 = 256 << 10;
/// Largest single secret, in bytes.
pub const MAX_SECRET: u64 = 1 << 20;
/// Most secrets.
pub const MAX_SECRETS: usize = 256;
/// Most words in lists such as `missing`, `busy` and `warnings` that are looked at.
pub const MAX_WORDS: usize = 64;
/// Longest such word, in bytes.
pub const MAX_WORD: usize = 512;
/// Most busy leases that are read.
pub const MAX_LEASES: usize = 64;
/// Longest busy lease, in seconds (one day): a forgotten one must not keep a guest up for ever.
pub const MAX_LEASE_SECONDS: u64 = 86_400;
