package spire

import (
	"fmt"
	"strings"
	"testing"
)

// translated is all that comes of a server.conf, or an agent.conf.
func translated(t *testing.T, name string) string {
	t.Helper()
	var b strings.Builder
	var list []Remark
	if strings.HasPrefix(name, "server") {
		yaml, follow, remarks, err := Server(name, fixture(t, name))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, yaml)
		for _, f := range follow {
			fmt.Fprintf(&b, "%+v\n", f)
		}
		list = remarks
	} else {
		yaml, remarks, err := Agent(name, fixture(t, name))
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(yaml)
		list = remarks
	}
	b.WriteString("\n")
	for _, r := range list {
		fmt.Fprintln(&b, r)
	}
	return b.String()
}

func TestConfigurationsOfSPIRE(t *testing.T) {
	for _, name := range []string{"server", "agent", "server_full", "agent_full"} {
		t.Run(name, func(t *testing.T) {
			got := translated(t, name+".conf")
			golden(t, name+".golden", got)
			for _, secret := range []string{"hunter2", "3c37b5e1"} {
				if strings.Contains(got, secret) {
					t.Errorf("a secret of SPIRE's is printed: %s", secret)
				}
			}
			// What SPIRE documents is known here: translated, or named with the reason.
			for line := range strings.Lines(got) {
				if strings.Contains(line, "unknown key") && !strings.Contains(line, "shard_by_moon") {
					t.Errorf("SPIRE documents it: %s", line)
				}
			}
		})
	}
}

// JSON is read as HCL is; lists of blocks are blocks.
func TestConfigurationInJSON(t *testing.T) {
	yaml, _, list, err := Server("f", []byte(`{"server": {"trust_domain": "shop.test", "bind_port": "1"},
"plugins": {"NodeAttestor": [{"x509pop": {"plugin_data": {"ca_bundle_path": "/a.pem"}}}, {"sshpop": {"plugin_data": {"x": 1}}}]}}`))
	if err != nil || !strings.Contains(yaml, `x509pop: {ca_file: "/a.pem"}`) || !strings.Contains(yaml, `address: "0.0.0.0:1"`) {
		t.Errorf("%s\n%v", yaml, err)
	}
	if len(list) != 1 || !list[0].Missing || list[0].Of != "plugins.NodeAttestor.sshpop.plugin_data.x" {
		t.Errorf("remarks %+v", list)
	}
}

// What is printed as a command cannot begin another line.
func TestWordsOfACommand(t *testing.T) {
	for _, block := range []string{
		`federates_with "a.test\nb" { bundle_endpoint_url = "https://a.test" bundle_endpoint_profile "https_web" {} }`,
		`federates_with "a.test" { bundle_endpoint_url = "https://a.test\ndevelopment: true" bundle_endpoint_profile "https_web" {} }`,
		`federates_with "a.test" { bundle_endpoint_url = "https://a.test" }`,
		`federates_with "a.test" { bundle_endpoint_url = "http://a.test" bundle_endpoint_profile "https_web" {} }`,
		`federates_with "a.test" { bundle_endpoint_url = "https://u:p@a.test" bundle_endpoint_profile "https_web" {} }`,
		`federates_with "a.test" { bundle_endpoint_url = "https://a.test" bundle_endpoint_profile "https_spiffe" {} }`,
		`federates_with "a.test" { bundle_endpoint_url = "https://a.test" bundle_endpoint_profile "https_spiffe" { endpoint_spiffe_id = "a.test" } }`,
	} {
		_, follow, list, err := Server("f", []byte("server { federation { "+block+" } }"))
		if err != nil || len(follow) != 0 || len(list) == 0 || !list[0].Missing {
			t.Errorf("%s: %+v, %+v, %v; want a remark alone", block, follow, list, err)
		}
	}
}

// Nobody follows their own trust domain.
func TestOwnTrustDomainIsNotFollowed(t *testing.T) {
	const with = ` { bundle_endpoint_url = "https://a.test" bundle_endpoint_profile "https_web" {} }`
	_, follow, list, err := Server("f", []byte(`server { trust_domain = "a.test" federation { federates_with "a.test"`+with+` federates_with "b.test"`+with+` } }`))
	if err != nil || len(follow) != 1 || follow[0].TrustDomain != "b.test" {
		t.Errorf("%+v, %v; want b.test alone", follow, err)
	}
	if len(list) == 0 || list[0].Missing || !strings.Contains(list[0].Of, "a.test") {
		t.Errorf("%+v; want a note", list)
	}
}

// What says how it is here anyway, or nothing at all, is not named; a plugin of one's
// own and settings in another file are.
func TestSettingsThatNeedNoWord(t *testing.T) {
	for text, want := range map[string]int{
		`server { trust_domain = "a.test" federation {} experimental {} ratelimit {} }  plugins {} telemetry {} health_checks {}`: 0,
		`server { audit_log_enabled = true disable_jwt_svids = false experimental { require_pq_kem = false } }`:                   0,
		`server { audit_log_enabled = false disable_jwt_svids = true experimental { require_pq_kem = true } }`:                    3,
		`server { moon = {} experimental { moon = 1 } }`:                                                                          2,
		`plugins { Moon "full" {} }`:                                                1,
		`plugins { NodeAttestor "join_token" { plugin_data_file = "/a" } }`:         1,
		`plugins { KeyManager "disk" { plugin_cmd = "/a" plugin_checksum = "1" } }`: 1,
	} {
		_, _, list, err := Server("f", []byte(text))
		if err != nil || len(list) != want {
			t.Errorf("%s: %+v, %v; want %d remarks", text, list, err, want)
		}
	}
}

// A node attestor that SPIRE has switched off takes no node here.
func TestPluginThatIsSwitchedOff(t *testing.T) {
	yaml, _, list, err := Server("f", []byte(`plugins { NodeAttestor "x509pop" { enabled = false plugin_data { ca_bundle_path = "/a.pem" } } }`))
	if err != nil || strings.Contains(yaml, "x509pop") || len(list) != 1 {
		t.Errorf("%s\n%+v, %v", yaml, list, err)
	}
}

func TestConfigurationsThatAreRefused(t *testing.T) {
	for name, text := range map[string]string{
		"no HCL":            "server { trust_domain = ",
		"deep":              strings.Repeat("a {", maxBrackets+1) + strings.Repeat("}", maxBrackets+1),
		"long":              strings.Repeat("#", maxConfigBytes+1),
		"a string":          `server { trust_domain = "a\q" }`,
		"another character": "server { \x00 }",
	} {
		if yaml, _, _, err := Server("f", []byte(text)); err == nil || yaml != "" {
			t.Errorf("%s: %q, %v; want an error", name, yaml, err)
		}
	}
}

// Whatever is written is made something of, or named: no value is passed over.
func FuzzConfig(f *testing.F) {
	for _, name := range []string{"server.conf", "agent.conf", "server_full.conf", "agent_full.conf"} {
		f.Add(fixture(f, name))
	}
	f.Add([]byte(`{"server": {"trust_domain": "a", "x": [1, {"y": null}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		yaml, follow, list, err := Server("f", data)
		for _, w := range follow {
			if strings.ContainsAny(w.TrustDomain+w.URL+w.EndpointID, "\n\r\x1b") {
				t.Errorf("%+v begins another line", w)
			}
		}
		if err != nil && (yaml != "" || list != nil) {
			t.Error("an error, and an outcome")
		}
		_, more, _ := Agent("f", data)
		for _, r := range append(list, more...) {
			if strings.ContainsAny(r.String(), "\n\r\x1b") {
				t.Errorf("remark %q writes to the terminal itself", r)
			}
		}
	})
}
