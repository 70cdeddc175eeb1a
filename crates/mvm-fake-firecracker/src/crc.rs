//! CRC-64 (Jones), by which a flipped byte of a snapshot's state is noticed.

/// The polynomial, bits in reverse order.
const POLYNOMIAL: u64 = 0x95ac_9329_ac4b_c9b5;

pub fn crc64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |crc, byte| (0..8).fold(crc ^ u64::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_catalogue_s_check_value_comes_out() {
        // CRC-64/REDIS: "123456789".
        assert_eq!(super::crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca);
    }
}
