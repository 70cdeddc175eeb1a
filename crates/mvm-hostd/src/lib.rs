//! Everything of mvm that needs root, in the small crate that an auditor reads: bridges, TAPs, nftables, kernel settings,
//! limits, drives, and the sealing of secrets.
//!
//! It takes names, numbers and bytes, and knows nothing of tenants' documents. No shell is ever used; the only programs
//! it runs are `nft` and `mke2fs`, with arguments that are constants or descriptors. Every verb is idempotent: whoever
//! finds a half-done operation repeats it.
//!
//! | module | makes |
//! |---|---|
//! | [`netlink`], [`tap`] | bridges and TAPs, without the `ip` program |
//! | [`apart`] | a TAP in a network namespace of its own, and the cable to it |
//! | [`nft`] | the packet filter's two tables, in one transaction, and finds out without a process whether they still are |
//! | [`sysctl`] | kernel settings, and remembers what they were |
//! | [`dir`] | directory handles below which no symbolic link is followed |
//! | [`drive`] | data disks on disk, config and secrets drives in memory |
//! | [`seal`] | secrets at rest |
//! | [`cgroup`] | limits of processes by cgroup v2 |
//! | [`scratch`] | a directory that vanishes with the processes that use it |
//! | [`facts`] | what this host can do |

pub mod apart;
pub mod cgroup;
pub mod dir;
pub mod drive;
pub mod error;
pub mod facts;
pub mod netlink;
pub mod nft;
pub mod scratch;
pub mod seal;
pub mod sysctl;
pub mod tap;

mod program;

pub use error::HostdError;
