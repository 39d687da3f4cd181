package spire

import (
	"fmt"
	"strings"
	"testing"
)

func TestConfigurationOfASPIREServer(t *testing.T) {
	yaml, follow, list, err := Server("server.conf", fixture(t, "server.conf"))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintln(&b, yaml)
	for _, f := range follow {
		fmt.Fprintf(&b, "%+v\n", f)
	}
	b.WriteString("\n")
	for _, r := range list {
		fmt.Fprintln(&b, r)
	}
	golden(t, "server.golden", b.String())
	if strings.Contains(b.String(), "secret") {
		t.Error("a secret of SPIRE's is printed")
	}
}

func TestConfigurationOfASPIREAgent(t *testing.T) {
	yaml, list, err := Agent("agent.conf", fixture(t, "agent.conf"))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintln(&b, yaml)
	for _, r := range list {
		fmt.Fprintln(&b, r)
	}
	golden(t, "agent.golden", b.String())
	if strings.Contains(b.String(), "3c37b5e1") {
		t.Error("a join token is printed")
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
	} {
		_, follow, list, err := Server("f", []byte("server { federation { "+block+" } }"))
		if err != nil || len(follow) != 0 || len(list) == 0 || !list[0].Missing {
			t.Errorf("%s: %+v, %+v, %v; want a remark alone", block, follow, list, err)
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
	f.Add(fixture(f, "server.conf"))
	f.Add(fixture(f, "agent.conf"))
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
