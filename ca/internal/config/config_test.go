// Settings: what is refused, and which source wins.

package config

import (
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"merlon.dev/sdk/settings"
)

const localEtcd = "etcd_endpoints: ['http://127.0.0.1:2379']\n"

func etcdYAML(more string) string { return "trust_domain: a.test\nstore: etcd\n" + more }

func TestConfigRefusesWhatMakesNoSense(t *testing.T) {
	for name, test := range map[string]struct{ yaml, want string }{
		"unknown key":       {"trust_domian: a.test\n", `ca.yaml:1:1: `},
		"suggestion":        {"trust_domian: a.test\n", `did you mean "trust_domain"`},
		"no trust domain":   {"data_dir: /tmp/x\n", "trust_domain: is missing"},
		"bad domain":        {"trust_domain: spiffe://a\n", "trust_domain: "},
		"upper case":        {"trust_domain: A.test\n", "trust_domain: "},
		"bad address":       {"trust_domain: a.test\naddress: nowhere\n", "address: "},
		"bad port":          {"trust_domain: a.test\nhttps_address: ':99999'\n", "https_address: "},
		"long socket":       {"trust_domain: a.test\nadmin_socket: /" + strings.Repeat("s", 120) + "\n", "admin_socket: "},
		"relative socket":   {"trust_domain: a.test\nadmin_socket: a.sock\n", "admin_socket: "},
		"DNS name":          {"trust_domain: a.test\ndns_names: ['*.a.test']\n", "dns_names: "},
		"long TTL":          {"trust_domain: a.test\nx509_svid_ttl: 48h\n", "x509_svid_ttl: "},
		"negative TTL":      {"trust_domain: a.test\nagent_svid_ttl: -1h\n", "agent_svid_ttl: "},
		"root and hint":     {"trust_domain: a.test\nroot_ttl: 40s\ntrust_refresh_hint: 8s\n", "root_ttl: 40s is too short for a trust_refresh_hint of 8s: the next key is made at half of it, and signs three hints after that at the soonest; make root_ttl at least 1m20s, or trust_refresh_hint at most 4s"},
		"root, usual hint":  {"trust_domain: a.test\nroot_ttl: 49m59s\n", "root_ttl: "},
		"JWT key and hint":  {"trust_domain: a.test\njwt_key_ttl: 49m59s\n", "make jwt_key_ttl at least 50m0s"},
		"JWT algorithm":     {"trust_domain: a.test\njwt_algorithm: HS256\n", "jwt_algorithm: "},
		"too small a share": {"trust_domain: a.test\nagent_issue_rate: 9\n", "agent_issue_rate: "},
		"nine audiences":    {"trust_domain: a.test\njwt_max_audiences: 9\n", "jwt_max_audiences: "},
		"log level":         {"trust_domain: a.test\nlog_level: loud\n", "log_level: "},
		"log format":        {"trust_domain: a.test\nlog_format: xml\n", "log_format: "},
		"store":             {"trust_domain: a.test\nstore: redis\n", "store: "},
		"reserve":           {"trust_domain: a.test\ndisk_reserve_mib: -1\n", "disk_reserve_mib: "},
		"issuance log":      {"trust_domain: a.test\nissuance_log: lazy\n", "issuance_log: "},
		"short retention":   {"trust_domain: a.test\naudit_max_age: 23h\n", "audit_max_age: "},
		"a relative log":    {"trust_domain: a.test\ndecision_log_file: d.jsonl\n", "decision_log_file: "},
		"a small log":       {"trust_domain: a.test\ndecision_log_max_mib: -1\n", "decision_log_max_mib: "},
		"a log without old": {"trust_domain: a.test\ndecision_log_keep: -1\n", "decision_log_keep: "},
		"small retention":   {"trust_domain: a.test\naudit_max_mib: 63\n", "audit_max_mib: "},
		"more than all":     {"trust_domain: a.test\ncanary_denied_per_mille: 1001\n", "canary_denied_per_mille: "},
		"fewer than none":   {"trust_domain: a.test\ncanary_min_calls: -1\n", "canary_min_calls: "},
		"etcd unused":       {"trust_domain: a.test\netcd_endpoints: ['https://e:2379']\n", "etcd_endpoints: "},
		"etcd nowhere":      {etcdYAML(""), "etcd_endpoints: "},
		"etcd in clear":     {etcdYAML("etcd_endpoints: ['http://etcd-1:2379']\n"), "etcd_endpoints: "},
		"etcd no port":      {etcdYAML("etcd_endpoints: ['https://etcd-1']\n"), "etcd_endpoints: "},
		"etcd no keys":      {etcdYAML("etcd_endpoints: ['https://etcd-1:2379']\n"), "etcd_ca_file"},
		"replica name":      {"trust_domain: a.test\nreplica_name: A/B\n", "replica_name: "},
		"join on badger":    {"trust_domain: a.test\njoin_address: ca:8443\n", "join_address: "},
		"join nowhere":      {etcdYAML(localEtcd + "join_address: ':8443'\n"), "join_address: "},
		"token alone":       {"trust_domain: a.test\njoin_token: t\n", "join_address: "},
		"two tokens":        {etcdYAML(localEtcd + "join_address: ca:8443\njoin_token: t\njoin_token_file: /t\n"), "join_token_file: "},
		"no hash":           {etcdYAML(localEtcd + "join_address: ca:8443\njoin_token: t\n"), "root_hash: "},
		"two key sources":   {"trust_domain: a.test\nkey_file: /k\nkey_passphrase_file: /p\n", "key_file, "},
		"kek beside keys":   {"trust_domain: a.test\ndata_dir: /d\nkey_file: /d/keys/kek\n", "key_file: "},
		"credential path":   {"trust_domain: a.test\nkey_credential: /run/x\n", "key_credential: "},
		"upstream and etcd": {etcdYAML(localEtcd + "upstream: disk\nupstream_root_file: /r\nupstream_cert_file: /c\nupstream_key_file: /k\n"), "upstream: disk"},
		"unknown upstream":  {"trust_domain: a.test\nupstream: spire\n", "upstream: \"spire\""},
		"nested nowhere":    {"trust_domain: a.test\nupstream: merlon\n", "upstream_address: "},
		"nested on etcd":    {etcdYAML(localEtcd + "upstream: merlon\nupstream_address: ca:8443\n"), "store must be badger"},
		"nested replica":    {"trust_domain: a.test\nupstream: merlon\nupstream_address: ca:8443\njoin_address: ca:8443\n", "join_address: is for replicas"},
		"nested, a root":    {"trust_domain: a.test\nupstream: merlon\nupstream_address: ca:8443\nupstream_root_file: /r\n", "upstream_root_file: is for other upstreams"},
		"nested in itself":  {"trust_domain: a.test\nupstream: merlon\naddress: ca:8443\nupstream_address: ca:8443\n", "upstream_address: "},
		"nested, no hash":   {"trust_domain: a.test\nupstream: merlon\nupstream_address: ca:8443\njoin_token: t\n", "root_hash: "},
		"PIN in the file":   {"trust_domain: a.test\nkms: pkcs11:token=t?pin-value=1\n", "kms: "},
		"short hash":        {etcdYAML(localEtcd + "join_address: ca:8443\njoin_token: t\nroot_hash: 0a0a\n"), "root_hash: "},
		"bare TTL":          {"trust_domain: a.test\njwt_svid_ttl: 5\n", "ca.yaml:2:"},
	} {
		c, err := settings.Parse[Config]("ca.yaml", []byte(test.yaml))
		if err == nil {
			err = c.Validate()
		}
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q in it", name, err, test.want)
		}
	}
	for name, yaml := range map[string]string{
		"badger":       "trust_domain: a.test\nstore: badger\n",
		"etcd":         etcdYAML(localEtcd),
		"etcd by TLS":  etcdYAML("etcd_endpoints: ['https://etcd-1:2379']\netcd_ca_file: /c\netcd_cert_file: /d\netcd_key_file: /e\n"),
		"join":         etcdYAML(localEtcd + "join_address: ca:8443\njoin_token: t\nroot_hash: " + strings.Repeat("0a", 32) + "\n"),
		"nested":       "trust_domain: a.test\nupstream: merlon\nupstream_address: ca:8443\n",
		"joined":       etcdYAML(localEtcd + "join_address: ca:8443\n"),
		"with a name":  "trust_domain: a.test\nreplica_name: ca-1\n",
		"small budget": "trust_domain: a.test\ndisk_reserve_mib: 1\n",
		"short lives":  "trust_domain: a.test\nroot_ttl: 50m\njwt_key_ttl: 50m\n",
		"shortest":     "trust_domain: a.test\nroot_ttl: 10s\njwt_key_ttl: 10s\ntrust_refresh_hint: 1s\n",
	} {
		if c, err := settings.Parse[Config]("ca.yaml", []byte(yaml)); err != nil || c.Validate() != nil {
			t.Errorf("%s: %v, %v", name, err, c.Validate())
		}
	}
}

func TestFlagsWinOverEnvironmentOverFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.yaml")
	yaml := "trust_domain: file.test\ndata_dir: /file\nx509_svid_ttl: 2h\nadmin_uids: [7]\n"
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"MERLON_CA_DATA_DIR": "/env", "MERLON_CA_TRUST_DOMAIN": "env.test", "MERLON_CA_CONFIG": file}
	cl, err := ParseCommandLine([]string{"-trust-domain", "flag.test", "-dns-names", "a.test,b.test", "-development"}, func(k string) string { return env[k] }, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	c := cl.Config
	if c.TrustDomain != "flag.test" || c.DataDir != "/env" || c.X509SVIDTTL != 2*time.Hour || !c.Development ||
		!slices.Equal(c.AdminUIDs, []uint32{7}) || !slices.Equal(c.DNSNames, []string{"a.test", "b.test"}) {
		t.Errorf("config = %+v", c)
	}
	if d := c.WithDefaults(); d.Address != DefaultAddress || d.JWTSVIDTTL != DefaultJWTSVIDTTL {
		t.Errorf("defaults = %+v", d)
	}
}

func TestCommandLineRefusals(t *testing.T) {
	none := func(string) string { return "" }
	for _, args := range [][]string{
		{"-no-such-flag"},
		{"stray"},
		{"-trust-domain", "a.test", "-x509-svid-ttl", "soon"},
		{"-config", "/no/such/file"},
		{},
		{"-trust-domain", "a.test", "-admin-uids", "root"},
	} {
		if _, err := ParseCommandLine(args, none, io.Discard); err == nil {
			t.Errorf("ParseCommandLine(%q) took it", args)
		}
	}
	if _, err := ParseCommandLine([]string{"-h"}, none, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v; want flag.ErrHelp", err)
	}
	if cl, err := ParseCommandLine([]string{"-validate", "-trust-domain", "a.test"}, none, io.Discard); err != nil || !cl.ValidateOnly {
		t.Errorf("-validate: %+v, %v", cl, err)
	}
}

// Every setting of the file can also be set by flag and environment, but for lists of
// things.
func TestEverySettingHasAFlag(t *testing.T) {
	if err := program.Check("admins", "oidc", "node_attestors", "bundle_endpoint"); err != nil {
		t.Error(err)
	}
}

func TestAdministratorsInTheConfiguration(t *testing.T) {
	const good = "trust_domain: a.test\nadmin_uids: [7]\nadmins:\n  - {uid: 8, role: registrar, prefix: /ns/a}\noidc:\n" +
		"  - issuer: https://login.a.test\n    audience: merlon\n    roles:\n      - {claims: {sub: ci}, role: policy-publisher}\n"
	c, err := settings.Parse[Config]("ca.yaml", []byte(good))
	if err != nil || c.Validate() != nil {
		t.Fatal(err, c.Validate())
	}
	roles, err := c.UIDRoles()
	if err != nil || roles[7].String() != "operator" || roles[8].String() != "registrar of /ns/a" || len(roles) != 2 {
		t.Errorf("uidRoles = %v, %v", roles, err)
	}
	for want, change := range map[string][2]string{
		"admins[0].role":             {"role: registrar", "role: root"},
		"admins[0].prefix":           {", prefix: /ns/a", ""},
		"admins[0].uid: is 0":        {"uid: 8, ", ""},
		"admins[0].uid: 7 has":       {"uid: 8", "uid: 7"},
		"oidc[0].issuer":             {"https://login", "http://login"},
		"oidc[0].audience":           {"    audience: merlon\n", ""},
		"oidc[0].roles[0].role":      {"policy-publisher", "publisher"},
		"oidc[0].roles[0].claims":    {"claims: {sub: ci}, ", ""},
		"oidc[0].roles[0].prefix":    {"role: policy-publisher", "role: policy-publisher, prefix: /x"},
		"oidc[1].issuer":             {"oidc:\n", "oidc:\n" + good[strings.Index(good, "  - issuer"):]},
		"subject":                    {"claims: {sub: ci}", "subject: ci"},
		"oidc[0].roles[0].claims: e": {"{sub: ci}", "{exp: '1'}"},
	} {
		text := strings.Replace(good, change[0], change[1], 1)
		c, err := settings.Parse[Config]("ca.yaml", []byte(text))
		if err == nil {
			err = c.Validate()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want an error with %q", text, err, want)
		}
	}
	c.OIDC[0].CAFile = filepath.Join(t.TempDir(), "none.pem")
	if _, err := c.AdminTokens(nil); err == nil || !strings.Contains(err.Error(), "oidc[0].ca_file") {
		t.Errorf("tokens() = %v; want an error naming ca_file", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("trust_domain: a.test\n"))
	f.Add([]byte("admin_uids: [1, 2]\nx509_svid_ttl: 1h\n"))
	f.Add([]byte("trust_domain: a.test\nadmins: [{uid: 1, role: viewer}]\noidc: [{issuer: 'https://a.test', audience: a, roles: [{claims: {sub: a}, role: viewer}]}]\n"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		if c, err := settings.Parse[Config]("ca.yaml", data); err == nil {
			_ = c.Validate()
		}
	})
}
