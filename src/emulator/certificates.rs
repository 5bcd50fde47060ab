//! The emulator's own certificate authority and the certificates its edge shows, good and bad.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};

use super::{EmulatorError, faults::BadCertificate};

/// Signs the certificates of all endpoints.
pub(crate) struct Authorities {
    trusted: Authority,
    stranger: Authority,
}

impl Authorities {
    pub(crate) fn generate() -> Result<Self, EmulatorError> {
        Ok(Self {
            trusted: authority("Lakebase emulator CA")?,
            stranger: authority("An untrusted authority")?,
        })
    }

    /// The certificate in PEM that a client must trust.
    pub(crate) fn pem(&self) -> String {
        self.trusted.pem()
    }
}

/// What the edge can show for one endpoint, ready to accept with.
pub(crate) struct Certificates {
    good: Arc<ServerConfig>,
    expired: Arc<ServerConfig>,
    other_authority: Arc<ServerConfig>,
    wrong_name: Arc<ServerConfig>,
}

impl Certificates {
    /// Makes one certificate for all of `names`.
    pub(crate) fn generate(
        authorities: &Authorities,
        names: &[String],
    ) -> Result<Self, EmulatorError> {
        let Authorities { trusted, stranger } = authorities;
        Ok(Self {
            good: server(trusted, names, false)?,
            expired: server(trusted, names, true)?,
            other_authority: server(stranger, names, false)?,
            wrong_name: server(trusted, &["elsewhere.invalid".to_owned()], false)?,
        })
    }

    pub(crate) fn server(&self, fault: Option<BadCertificate>) -> Arc<ServerConfig> {
        Arc::clone(match fault {
            None => &self.good,
            Some(BadCertificate::Expired) => &self.expired,
            Some(BadCertificate::OtherAuthority) => &self.other_authority,
            Some(BadCertificate::WrongName) => &self.wrong_name,
        })
    }
}

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Result<Authority, EmulatorError> {
    let mut params = params(&[], name)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(certificate_error)?;
    CertifiedIssuer::self_signed(params, key).map_err(certificate_error)
}

fn server(
    authority: &Authority,
    names: &[String],
    is_expired: bool,
) -> Result<Arc<ServerConfig>, EmulatorError> {
    let mut params = params(names, "Lakebase emulator")?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    if is_expired {
        params.not_after = date_time_ymd(2021, 1, 1);
    }
    let key = KeyPair::generate().map_err(certificate_error)?;
    let certificate = params
        .signed_by(&key, authority)
        .map_err(certificate_error)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|source| EmulatorError::Tls { source })?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone(), authority.der().clone()],
            key,
        )
        .map_err(|source| EmulatorError::Tls { source })?;
    Ok(Arc::new(config))
}

fn params(names: &[String], common_name: &str) -> Result<CertificateParams, EmulatorError> {
    let mut params = CertificateParams::new(names).map_err(certificate_error)?;
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2049, 1, 1);
    Ok(params)
}

fn certificate_error(source: rcgen::Error) -> EmulatorError {
    EmulatorError::Certificate { source }
}
