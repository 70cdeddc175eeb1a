//! Whole fleets on the simulated monitor: no process, no root, no waiting.

mod build;
mod fleet;
mod kill;
mod order;
mod quota;
mod roles;
mod scale;
mod slow;
mod torn;
mod world;
