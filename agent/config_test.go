// Settings: what is refused, and which source wins.

package agent

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/sdk/settings"
)

func validConfig() Config {
	return Config{TrustDomain: "example.test", CAAddress: Addresses{"ca:8443"}, JoinToken: "t", RootHash: strings.Repeat("0a", 32)}
}

func TestValidateNamesTheField(t *testing.T) {
	if err := validConfig().Validate(); err != nil {
		t.Fatalf("Validate(a valid one) = %v", err)
	}
	tests := map[string]struct {
		change func(*Config)
		field  string
	}{
		"no trust domain":    {func(c *Config) { c.TrustDomain = "" }, "trust_domain"},
		"a SPIFFE ID":        {func(c *Config) { c.TrustDomain = "spiffe://example.test" }, "trust_domain"},
		"capitals":           {func(c *Config) { c.TrustDomain = "Example" }, "trust_domain"},
		"no CA":              {func(c *Config) { c.CAAddress = Addresses{""} }, "ca_address"},
		"port too high":      {func(c *Config) { c.CAAddress = Addresses{"ca:99999"} }, "ca_address"},
		"no port":            {func(c *Config) { c.CAAddress = Addresses{"ca"} }, "ca_address"},
		"HTTPS without port": {func(c *Config) { c.CAHTTPSAddress = Addresses{"ca"} }, "ca_https_address"},
		"an empty address":   {func(c *Config) { c.CAAddress = Addresses{"ca:8443", ""} }, "ca_address"},
		"an address twice":   {func(c *Config) { c.CAAddress = Addresses{"ca:8443", "ca:8443"} }, "ca_address"},
		"too many addresses": {func(c *Config) { c.CAAddress = many(maxAddresses + 1) }, "ca_address"},
		"one HTTPS too many": {func(c *Config) { c.CAHTTPSAddress = many(2) }, "ca_https_address"},
		"HTTPS for two of three": {func(c *Config) {
			c.CAAddress, c.CAHTTPSAddress = many(3), many(2)
		}, "ca_https_address"},
		"relative data_dir":     {func(c *Config) { c.DataDir = "data" }, "data_dir"},
		"long socket":           {func(c *Config) { c.PublicSocket = "/" + strings.Repeat("x", 107) }, "public_socket"},
		"sockets side by side":  {func(c *Config) { c.AdminSocket = filepath.Dir(DefaultPublicSocket) + "/a.sock" }, "admin_socket"},
		"two tokens":            {func(c *Config) { c.JoinTokenFile = "/t" }, "join_token_file"},
		"unknown attestor":      {func(c *Config) { c.NodeAttestor = "tpm" }, "node_attestor"},
		"evidence of two kinds": {func(c *Config) { c.NodeCertFile = "/c" }, "node_cert_file"},
		"no certificate":        {func(c *Config) { c.JoinToken, c.NodeAttestor, c.NodeKeyFile = "", "x509pop", "/k" }, "node_cert_file"},
		"relative certificate": {func(c *Config) {
			c.JoinToken, c.NodeAttestor, c.NodeCertFile, c.NodeKeyFile = "", "x509pop", "c", "/k"
		}, "node_cert_file"},
		"certificate without hash": {func(c *Config) {
			c.JoinToken, c.NodeAttestor, c.NodeCertFile, c.NodeKeyFile, c.RootHash = "", "x509pop", "/c", "/k", ""
		}, "root_hash"},
		"no audience": {func(c *Config) { c.JoinToken, c.NodeAttestor = "", "gcp" }, "node_audience"},
		"metadata over https": {func(c *Config) {
			c.JoinToken, c.NodeAttestor, c.NodeAudience, c.NodeMetadataURL = "", "azure", "a", "https://169.254.169.254"
		}, "node_metadata_url"},
		"audience for aws":          {func(c *Config) { c.JoinToken, c.NodeAttestor, c.NodeAudience = "", "aws", "a" }, "node_audience"},
		"audience for a join token": {func(c *Config) { c.NodeAudience = "a" }, "node_audience"},
		"token without hash":        {func(c *Config) { c.RootHash = "" }, "root_hash"},
		"short hash":                {func(c *Config) { c.RootHash = "0a" }, "root_hash"},
		"impatient":                 {func(c *Config) { c.RevocationMaxAge = time.Second }, "revocation_max_age"},
		"unknown on_stale":          {func(c *Config) { c.OnStale = "panic" }, "on_stale"},
		"hasty about policy":        {func(c *Config) { c.PolicyStaleAfter = time.Second }, "policy_stale_after"},
		"too old before it is":      {func(c *Config) { c.PolicyStaleAfter, c.PolicyMaxAge = time.Hour, time.Minute }, "policy_max_age"},
		"unknown policy_on_stale":   {func(c *Config) { c.PolicyOnStale = "panic" }, "policy_on_stale"},
		"policy path":               {func(c *Config) { c.PolicyBundle = "../x" }, "policy_bundle"},
		"unknown log level":         {func(c *Config) { c.LogLevel = "loud" }, "log_level"},
		"unknown log format":        {func(c *Config) { c.LogFormat = "xml" }, "log_format"},
		"health without a port":     {func(c *Config) { c.HealthAddress = "localhost" }, "health_address"},
		"kubelet without a port":    {func(c *Config) { c.KubeletAddress = "node1" }, "kubelet_address"},
		"kubelet as a URL":          {func(c *Config) { c.KubeletAddress = "https://node1:10250/pods" }, "kubelet_address"},
		"kubelet turned off":        {func(c *Config) { c.KubeletAddress = "off" }, "kubelet_address"},
		"token for no kubelet":      {func(c *Config) { c.KubeletTokenFile = "/t" }, "kubelet_token_file"},
		"CA for no kubelet":         {func(c *Config) { c.KubeletCAFile = "/c" }, "kubelet_ca_file"},
		"no token of a pod":         {func(c *Config) { c.JoinToken, c.NodeAttestor, c.K8sCluster = "", "k8s", "prod" }, "k8s_token_file"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := validConfig()
			tt.change(&c)
			if e, ok := errors.AsType[*InvalidError](c.Validate()); !ok || e.Field != tt.field || e.Reason == "" {
				t.Errorf("Validate() = %v; want a reason for %s", c.Validate(), tt.field)
			}
		})
	}
}

func many(n int) (out Addresses) {
	for i := range n {
		out = append(out, fmt.Sprintf("ca%d:8443", i))
	}
	return out
}

func TestAddressesAreOneOrAList(t *testing.T) {
	for name, tt := range map[string]struct{ text, address, https string }{
		"one":            {"ca_address: a:1", "a:1", "a:8444"},
		"a list":         {"ca_address: [a:1, 'b:2']", "a:1, b:2", "a:8444, b:8444"},
		"commas":         {"ca_address: a:1,b:2", "a:1, b:2", "a:8444, b:8444"},
		"both":           {"ca_address: [a:1, b:2]\nca_https_address: [a:3, b:4]", "a:1, b:2", "a:3, b:4"},
		"HTTPS for both": {"ca_address: [a:1, b:2]\nca_https_address: lb:3", "a:1, b:2", "lb:3"},
	} {
		c, err := settings.Parse[Config]("agent.yaml", []byte("trust_domain: example.test\n"+tt.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := c.Validate(); err != nil {
			t.Errorf("%s: Validate() = %v", name, err)
		}
		if c = c.withDefaults(); c.CAAddress.String() != tt.address || c.CAHTTPSAddress.String() != tt.https {
			t.Errorf("%s: addresses %q and %q; want %q and %q", name, c.CAAddress, c.CAHTTPSAddress, tt.address, tt.https)
		}
	}
}

func TestUnknownKeyIsRefusedWithLineAndSuggestion(t *testing.T) {
	_, err := settings.Parse[Config]("agent.yaml", []byte("trust_domain: example.test\nca_addrss: ca:8443\n"))
	if err == nil || !strings.Contains(err.Error(), "agent.yaml:2") || !strings.Contains(err.Error(), "ca_address") {
		t.Errorf("Parse() = %v; want line 2 and the right key", err)
	}
}

func TestFlagsWinOverEnvironmentOverFileOverDefault(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	content := "trust_domain: file.test\nca_address: file:1\npolicy_bundle: file\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{
		"MERLON_AGENT_CONFIG": file, "MERLON_AGENT_CA_ADDRESS": "env:2, env2:2", "MERLON_AGENT_POLICY_BUNDLE": "env",
		"MERLON_AGENT_JOIN_TOKEN": "secret", "MERLON_AGENT_ROOT_HASH": strings.Repeat("0a", 32),
		"MERLON_AGENT_ADMIN_UIDS": "7, 8",
	}
	cl, err := ParseCommandLine([]string{"-policy-bundle", "flag", "-revocation-max-age", "1m", "-validate"},
		func(k string) string { return env[k] }, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	c := cl.Config.withDefaults()
	if c.TrustDomain != "file.test" || c.CAAddress.String() != "env:2, env2:2" || c.PolicyBundle != "flag" || c.JoinToken != "secret" ||
		c.RevocationMaxAge != time.Minute || len(c.AdminUIDs) != 2 || !cl.ValidateOnly || c.CAHTTPSAddress.String() != "env:8444, env2:8444" ||
		c.DataDir != DefaultDataDir {
		t.Errorf("ParseCommandLine() = %+v", c)
	}
}

func TestCommandLineMistakes(t *testing.T) {
	none := func(string) string { return "" }
	if _, err := ParseCommandLine([]string{"-h"}, none, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h = %v; want ErrHelp", err)
	}
	for _, args := range [][]string{
		{"-join-token", "x"}, // readable in the list of processes
		{"-nonsense"},
		{"extra"},
		{"-config", "/does/not/exist"},
		{"-admin-uids", "root"},
		{"-revocation-max-age", "5"},
		nil, // nothing is set
	} {
		if _, err := ParseCommandLine(args, none, io.Discard); err == nil {
			t.Errorf("ParseCommandLine(%q) succeeded", args)
		}
	}
}

func TestEverySettingHasAFlag(t *testing.T) {
	if err := program.Check(); err != nil {
		t.Error(err)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("trust_domain: example.test\nca_address: ca:8443\nadmin_uids: [1]\nrevocation_max_age: 5m\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		if cfg, err := settings.Parse[Config]("f", data); err == nil {
			_ = cfg.Validate()
		}
	})
}
