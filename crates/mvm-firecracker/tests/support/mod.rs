//! A server that keeps what it was asked, and microVMs to ask for. Each test program uses a part of it.
#![allow(dead_code)]

pub mod server;
pub mod spec;
pub mod strategies;
pub mod values;
