//! Certificates of a test's own, made by the `openssl` command line: authorities, and certificates for servers and clients.

use std::path::PathBuf;
use std::process::Command;

use super::rabbit::Supervised;

/// A folder of PEM files: `NAME.pem` and `NAME.key`.
pub(crate) struct Certs {
    folder: PathBuf,
    _cleaner: Supervised,
}

impl Certs {
    /// With an authority `ca`, a certificate `server` for `localhost` and 127.0.0.1, and one `client`.
    pub(crate) fn new() -> Self {
        // As of a broker: what tests share is never dropped.
        let folder =
            tempfile::Builder::new().prefix("onewrite-certs-").tempdir().expect("a temporary folder").keep();
        let certs = Self { _cleaner: Supervised::cleaner(&folder), folder };
        certs.authority("ca");
        certs.issue("ca", "server", "DNS:localhost,IP:127.0.0.1", 30);
        certs.issue("ca", "client", "DNS:ledger", 30);
        certs
    }

    pub(crate) fn authority(&self, name: &str) {
        let subject = format!("/CN=onewrite test {name}");
        let request = ["req", "-x509", "-days", "30", "-subj", &subject, "-newkey", "ec", "-nodes"];
        let request = [&request[..], &["-pkeyopt", "ec_paramgen_curve:prime256v1"]].concat();
        let extensions =
            ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"];
        let files = [format!("{name}.key"), format!("{name}.pem")];
        self.openssl(&[&request[..], &extensions, &["-keyout", &files[0], "-out", &files[1]]].concat());
    }

    /// A certificate of `authority` for `names`, good for `days` from now; negative, it has expired. Takes the place of one of the
    /// same name.
    pub(crate) fn issue(&self, authority: &str, name: &str, names: &str, days: i32) {
        let extensions = format!("basicConstraints=critical,CA:FALSE\nsubjectAltName={names}\n");
        std::fs::write(self.path("extensions"), extensions).expect("write into the temporary folder");
        let subject = format!("/CN={name}");
        let key = format!("{name}.key");
        let request = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        self.openssl(&[&request[..], &["-subj", &subject, "-keyout", &key, "-out", "request"]].concat());
        let (ca, ca_key, pem, days) =
            (format!("{authority}.pem"), format!("{authority}.key"), format!("{name}.pem"), days.to_string());
        let sign = ["x509", "-req", "-in", "request", "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial"];
        self.openssl(&[&sign[..], &["-days", &days, "-extfile", "extensions", "-out", &pem]].concat());
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    pub(crate) fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.path(file)).expect("it was made")
    }

    /// Settings of a broker that takes TLS on `port`, with the certificate `server`; and, if it `demands` one, only from
    /// clients with a certificate of `ca`.
    pub(crate) fn listener(&self, port: u16, demands: bool) -> String {
        let [ca, pem, key] =
            ["ca.pem", "server.pem", "server.key"].map(|file| self.path(file).display().to_string());
        let verify = if demands { "verify_peer" } else { "verify_none" };
        format!(
            "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {ca}\nssl_options.certfile = {pem}\n\
             ssl_options.keyfile = {key}\nssl_options.verify = {verify}\nssl_options.fail_if_no_peer_cert = {demands}\n"
        )
    }

    fn openssl(&self, arguments: &[&str]) {
        let output =
            Command::new("openssl").args(arguments).current_dir(&self.folder).output().unwrap_or_else(
                |error| panic!("these tests need `openssl`: run `apt-get install openssl` ({error})"),
            );
        assert!(
            output.status.success(),
            "openssl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
