//! Entry points for tests/fuzz: certificates of any server.

use rustls::pki_types::CertificateDer;

use super::certificates::Certificate;

/// Its description is one line of text.
pub fn certificate(der: &[u8]) {
    let der = CertificateDer::from(der);
    if let Some(certificate) = Certificate::parse(&der, &der) {
        for text in certificate.names.iter().chain([&certificate.authority]) {
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
        let _ = certificate.to_string();
    }
}
