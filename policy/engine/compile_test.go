// What Rego a policy may bring, and what it may call (SECURITY.md T30).

package engine

import (
	"errors"
	"strings"
	"testing"
)

// T30: what reaches outside, is random, reads unverified tokens or runs
// further code is refused with the reason, however it is spelt.
func TestT30BuiltinsThatAreNotAllowed(t *testing.T) {
	tests := map[string]struct{ rego, want string }{
		"http.send":            {`allow if http.send({"method": "GET", "url": "http://evil.test"}).status_code == 200`, "http.send is not available: decisions do not wait"},
		"net.lookup_ip_addr":   {`allow if count(net.lookup_ip_addr("evil.test")) > 0`, "net.lookup_ip_addr is not available"},
		"opa.runtime":          {`allow if opa.runtime().env.HOME`, "opa.runtime is not available"},
		"rego.parse_module":    {`allow if rego.parse_module("x", "package x")`, "rego.parse_module is not available"},
		"io.jwt.decode":        {`allow if io.jwt.decode(input.x)[1].sub == "a"`, "input.jwt has the claims"},
		"io.jwt.decode_verify": {`allow if io.jwt.decode_verify(input.x, {})[0]`, "input.jwt has the claims"},
		"trace":                {`allow if trace("x")`, "use print"},
		"rand.intn":            {`allow if rand.intn("x", 2) == 1`, "the same call gets the same decision"},
		"uuid.rfc4122":         {`allow if uuid.rfc4122("x") != ""`, "the same call gets the same decision"},
		"aws":                  {`allow if providers.aws.sign_req({}, {}, 1)`, "is not available"},
		"x509":                 {`allow if crypto.x509.parse_and_verify_certificates("x")[0]`, "is not available"},
		"schema":               {`allow if json.match_schema({}, {"$ref": "http://evil.test"})[0]`, "is not available"},
		"template":             {`allow if strings.render_template("{{.x}}", {"x": 1}) == "1"`, "is not available"},
		"yaml":                 {`allow if yaml.unmarshal("x")`, "is not available"},
		"with on a function":   {`allow if count("x") == 1 with count as http.send`, "http.send is not available"},
		"with, own function":   {"f(x) := x\nallow if f({\"method\": \"GET\", \"url\": \"http://evil.test\"}).status_code == 200 with f as http.send", "http.send is not available"},
		"with replacing":       {"mock(_) := {}\nallow if http.send({}) == {} with http.send as mock", "http.send is not available"},
		"in a comprehension":   {`allow if [x | x := http.send({})][0]`, "http.send is not available"},
		"in a head":            {`allow := http.send({"method": "GET", "url": "http://evil.test"}).body`, "http.send is not available"},
		"in a default":         {"default allow := false\nallow if { every x in [1] { http.send(x) } }", "http.send is not available"},
		"bits.lsh":             {`allow if bits.lsh(1, to_number(input.parsed_query.n[0])) == 1`, "bits.lsh is not available"},
		"unknown function":     {`allow if does.nothing(1)`, "undefined function does.nothing"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := CheckModules(map[string]string{"authz.rego": "package authz\n\n" + tt.rego + "\n"})
			e, ok := errors.AsType[*Error](err)
			if !ok || !strings.Contains(err.Error(), tt.want) || e.File != "authz.rego" || e.Line < 3 {
				t.Errorf("error %v; want authz.rego:LINE: … %s", err, tt.want)
			}
		})
	}
}

// The compiler refuses them by itself too: explaining is not what protects.
func TestT30CapabilitiesHoldWithoutTheExplanation(t *testing.T) {
	for _, name := range []string{"http.send", "net.lookup_ip_addr", "opa.runtime", "rego.parse_module", "io.jwt.decode", "trace", "rand.intn", "uuid.rfc4122"} {
		for _, f := range Capabilities().Builtins {
			if f.Name == name {
				t.Errorf("%s is among the capabilities", name)
			}
		}
		if refusal(name) == "" {
			t.Errorf("%s is refused without explanation", name)
		}
	}
	if net := Capabilities().AllowNet; net == nil || len(net) > 0 {
		t.Errorf("AllowNet = %v; want an empty list: nil means everything", net)
	}
}

func TestModuleCompiles(t *testing.T) {
	if _, err := compile(map[string]string{ModuleName: Module}, nil); err != nil {
		t.Error(err)
	}
}

func TestForeignModuleAloneIsCompiled(t *testing.T) {
	if err := CheckModules(map[string]string{ModuleName: "package merlon\n\nx := http.send({})\n"}); err == nil {
		t.Error("no error")
	}
	if err := CheckModules(map[string]string{ModuleName: "package merlon\n\nx := 1\n"}); err != nil {
		t.Error(err)
	}
}

func TestUsefulBuiltinsAreAllowed(t *testing.T) {
	err := CheckModules(map[string]string{"authz.rego": `package authz

import data.lib

allow if {
	print("source", input.attributes.source.principal)
	some x in split(input.attributes.request.http.path, "/")
	startswith(x, "a")
	regex.match("^a+$", x)
	glob.match("a*", [], x)
	time.now_ns() > 0
	net.cidr_contains("10.0.0.0/8", "10.1.1.1")
	json.unmarshal("{}") == {}
	every y in [1, 2] { y > 0 }
	lib.ok
	x == $"a{x}"
}
`, "lib/lib.rego": "package lib\n\nok := true\n"})
	if err != nil {
		t.Error(err)
	}
}

func TestModulesThatAreRefused(t *testing.T) {
	tests := map[string]struct{ rego, want string }{
		"package merlon":    {"package merlon\n\nverdict(_) := [\"ALLOWED\", \"x\"]\n", "a.rego:1:1: package merlon is reserved"},
		"below merlon":      {"package merlon.index\n\nx := 1\n", "is reserved"},
		"package system":    {"package system.authz\n\nallow := true\n", "is reserved"},
		"partial set deny":  {"package authz\n\ndeny contains \"x\" if input.x\n", "deny must be a boolean rule"},
		"partial set allow": {"package envoy.authz\n\nallow contains 1\n", "allow must be a boolean rule"},
		"function":          {"package authz\n\nallow(x) if x\n", "allow must be a boolean rule"},
		"a set from above":  {"package envoy\n\nauthz.allow contains 1\n", "authz.allow must be a boolean rule"},
		"a function there":  {"package envoy\n\nauthz.deny(x) if x\n", "authz.deny must be a boolean rule"},
		"syntax":            {"package authz\n\nallow if {\n", "a.rego:"},
		"version 0":         {"package authz\n\nallow { input.x }\n", "`if` keyword is required"},
		"recursion":         {"package authz\n\nallow if deny\n\ndeny if allow\n", "recursive"},
		"asks the decision": {"package authz\n\nallow if data.merlon.decision.allow\n", "recursive"},
		"all data":          {"package authz\n\nallow if data[input.x].decision\n", "recursive"},
		"type":              {"package authz\n\nallow if count(1) == 1\n", "a.rego:3:10"},
		"never asked":       {"package shop\n\ndeny if input.x\n", "a.rego:1:1: package shop is never asked"},
		"empty":             {"", "is empty"},
		"too long":          {"package authz\n" + strings.Repeat("#", maxModuleBytes), "is longer than"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := CheckModules(map[string]string{"a.rego": tt.rego})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want %q", err, tt.want)
			}
		})
	}
}

// A policy can see the data of grants but not stand in for it.
func TestRegoCannotReplaceData(t *testing.T) {
	e := load(t, parseGrants(t, webReadsOrders), map[string]string{"a.rego": `package authz

deny if not data.merlon.grants["web-reads-orders"]
`})
	if d := e.Authorize(t.Context(), get("/orders")); !d.Allow {
		t.Errorf("decision = %+v", d)
	}
}

// What a policy may read of grants it gets, however it comes by the name.
func TestReadsGrants(t *testing.T) {
	for rego, want := range map[string]bool{
		`allow if count(data.merlon.grants) > 2`:                                  true,
		`allow if count(data["merlon"].grants) > 2`:                               true,
		`allow if { some k; count(data[k].grants) > 2 }`:                          true,
		`allow if count(data[concat("", ["mer", "lon"])].grants) > 2`:             true,
		`allow if count(data[[n | n := "merlon"][0]].grants) > 2`:                 true,
		"import data.merlon as m\n\nallow if count(m.grants) > 2":                 true,
		"import data as d\n\nallow if count(d.merlon.grants) > 2":                 true,
		`allow if data.authz.helper` + "\n\nhelper if input.protocol == \"http\"": false,
		`allow if input.attributes.request.http.method == "merlon"`:               false,
	} {
		modules := map[string]string{"own.rego": "package authz\n\n" + rego + "\n"}
		if err := CheckModules(modules); err != nil {
			t.Errorf("%s: %v", rego, err)
		}
		if got := ReadsGrants(modules); got != want {
			t.Errorf("%s: %v", rego, got)
		}
	}
}
