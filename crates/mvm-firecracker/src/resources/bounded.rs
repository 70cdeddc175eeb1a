//! Numbers that the API takes within bounds only.

use serde::{Deserialize, Serialize};

/// A number that the API would refuse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is from {min} to {max}, not {got}")]
pub struct OutOfBounds {
    what: &'static str,
    min: u32,
    max: u32,
    got: u32,
}

macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident: $number:ty, $what:literal, $min:literal..=$max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u32", into = "u32")]
        pub struct $name($number);

        impl $name {
            /// The least.
            pub const MIN: $number = $min;
            /// The most.
            pub const MAX: $number = $max;

            /// The number.
            #[must_use]
            pub fn get(self) -> $number {
                self.0
            }
        }

        impl TryFrom<u32> for $name {
            type Error = OutOfBounds;

            fn try_from(got: u32) -> Result<Self, OutOfBounds> {
                let (min, max) = (u32::from(Self::MIN), u32::from(Self::MAX));
                match <$number>::try_from(got) {
                    Ok(number) if (min..=max).contains(&got) => Ok(Self(number)),
                    _ => Err(OutOfBounds { what: $what, min, max, got }),
                }
            }
        }

        impl From<$name> for u32 {
            fn from(number: $name) -> u32 {
                number.0.into()
            }
        }
    };
}

bounded! {
    /// How many vCPUs a guest has.
    VcpuCount: u8, "the number of vCPUs", 1..=32
}
bounded! {
    /// A guest's address in vsock; 0, 1 and 2 are the hypervisor's, its own and the host's, the last is any.
    GuestCid: u32, "a guest's CID", 3..=u32::MAX - 1
}
bounded! {
    /// The size of the largest packet, in bytes.
    Mtu: u16, "an MTU", 68..=u16::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_bounds_cannot_be_made() {
        assert_eq!(VcpuCount::try_from(0).unwrap_err().to_string(), "the number of vCPUs is from 1 to 32, not 0");
        assert!(VcpuCount::try_from(33).is_err() && VcpuCount::try_from(257).is_err());
        assert_eq!(VcpuCount::try_from(32).map(VcpuCount::get), Ok(32));
        assert!(GuestCid::try_from(2).is_err() && GuestCid::try_from(u32::MAX).is_err());
        assert_eq!(GuestCid::try_from(3).map(GuestCid::get), Ok(3));
        assert!(Mtu::try_from(67).is_err() && Mtu::try_from(65_536).is_err());
        assert!(serde_json::from_str::<GuestCid>("2").is_err());
        assert_eq!(serde_json::to_string(&VcpuCount::try_from(4).unwrap()).unwrap(), "4");
    }
}
