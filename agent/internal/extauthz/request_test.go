// What of a request is believed, and what is refused.

package extauthz

import (
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"merlon.dev/policy"
)

// asked is a request as an Envoy sends it with encode_raw_headers; change it as needed.
func asked(method, path string, fields ...string) *authv3.AttributeContext {
	m := &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
		{Key: ":method", RawValue: []byte(method)}, {Key: ":path", RawValue: []byte(path)}, {Key: ":authority", RawValue: []byte("orders")},
	}}
	for i := 0; i < len(fields); i += 2 {
		m.Headers = append(m.Headers, &corev3.HeaderValue{Key: fields[i], RawValue: []byte(fields[i+1])})
	}
	return &authv3.AttributeContext{
		ContextExtensions: map[string]string{"merlon.protocol": "http"},
		Source:            &authv3.AttributeContext_Peer{Address: socket("192.0.2.7", 4000), Principal: "spiffe://shop.test/web"},
		Destination:       &authv3.AttributeContext_Peer{Address: socket("2001:db8::1", 8443), Principal: "spiffe://shop.test/orders"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: method, Path: path, Host: "orders", HeaderMap: m, Protocol: "HTTP/2",
		}},
	}
}

func socket(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// merged is the same as an Envoy sends it without.
func merged(a *authv3.AttributeContext) *authv3.AttributeContext {
	http := a.GetRequest().GetHttp()
	http.Headers = map[string]string{}
	for _, h := range http.GetHeaderMap().GetHeaders() {
		if was, ok := http.GetHeaders()[h.GetKey()]; ok {
			http.Headers[h.GetKey()] = was + "," + string(h.GetRawValue())
			continue
		}
		http.Headers[h.GetKey()] = string(h.GetRawValue())
	}
	http.HeaderMap = nil
	return a
}

func with(a *authv3.AttributeContext, change func(*authv3.AttributeContext)) *authv3.AttributeContext {
	change(a)
	return a
}

func protocol(p string) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) { a.ContextExtensions["merlon.protocol"] = p }
}

func TestRead(t *testing.T) {
	fields := []string{"accept", "a", "Accept", "b", "x-spiffe-id", "spiffe://shop.test/admin", "X_Forwarded_Client_Cert", "URI=x"}
	want := &policy.Input{
		Protocol: policy.HTTP, Method: "GET", Path: "/orders/1", Query: "full=1", Host: "orders",
		Headers: policy.HeaderMap{"accept": {"a", "b"}}, SourceAddress: "192.0.2.7:4000", DestinationAddress: "[2001:db8::1]:8443",
	}
	c := read(asked("GET", "/orders/1?full=1", fields...))
	if diff := cmp.Diff(want, c.in); diff != "" || c.fault != nil {
		t.Errorf("fault %v (-want +got):\n%s", c.fault, diff)
	}
	if diff := cmp.Diff([]string{"x-spiffe-id", "x_forwarded_client_cert"}, c.forged); diff != "" {
		t.Errorf("forged (-want +got):\n%s", diff)
	}
	want.Headers = policy.HeaderMap{"accept": {"a,b"}}
	if c := read(merged(asked("GET", "/orders/1?full=1", "accept", "a", "accept", "b"))); c.fault != nil || !cmp.Equal(want, c.in) {
		t.Errorf("merged: fault %v (-want +got):\n%s", c.fault, cmp.Diff(want, c.in))
	}
	// What arrived does not make it gRPC, and the configuration does.
	if c := read(asked("POST", "/shop.Orders/List", "content-type", "application/grpc")); c.in.Protocol != policy.HTTP {
		t.Errorf("by its content type the call is %s", c.in.Protocol)
	}
	if c := read(with(asked("POST", "/shop.Orders/List", "content-type", "text/plain"), protocol("grpc"))); c.in.Protocol != policy.GRPC || c.fault != nil {
		t.Errorf("by the configuration the call is %s, %v", c.in.Protocol, c.fault)
	}
}

func TestWhatIsRefused(t *testing.T) {
	get := func() *authv3.AttributeContext { return asked("GET", "/orders") }
	http := func(change func(*authv3.AttributeContext_HttpRequest)) *authv3.AttributeContext {
		a := get()
		change(a.GetRequest().GetHttp())
		return a
	}
	for name, tt := range map[string]struct {
		a    *authv3.AttributeContext
		want policy.Reason
		says string
	}{
		"nothing":              {nil, policy.Error, "merlon.protocol is missing"},
		"no protocol":          {with(get(), protocol("")), policy.Error, "merlon.protocol is missing"},
		"another protocol":     {with(get(), protocol("HTTP")), policy.Error, `"HTTP"`},
		"tcp":                  {with(get(), protocol("tcp")), policy.Error, `"tcp"`},
		"a misspelt extension": {with(get(), func(a *authv3.AttributeContext) { a.ContextExtensions["merlon.protcol"] = "grpc" }), policy.Error, "merlon.protcol"},
		"another's extension":  {with(get(), func(a *authv3.AttributeContext) { a.ContextExtensions["other"] = "x" }), "", ""},
		"no request":           {with(get(), func(a *authv3.AttributeContext) { a.Request = nil }), policy.Error, "not about HTTP"},
		"no header fields":     {http(func(r *authv3.AttributeContext_HttpRequest) { r.HeaderMap = nil }), policy.Error, "allowed_headers"},
		"picked header fields": {http(func(r *authv3.AttributeContext_HttpRequest) {
			r.HeaderMap.Headers = []*corev3.HeaderValue{{Key: "accept", RawValue: []byte("a")}}
		}), policy.Error, "allowed_headers"},
		"header fields twice": {http(func(r *authv3.AttributeContext_HttpRequest) { r.Headers = map[string]string{":path": "/orders"} }), policy.Error, "twice"},
		"two paths":           {http(func(r *authv3.AttributeContext_HttpRequest) { r.Path = "/other" }), policy.Error, "header fields"},
		"a value that is no text": {http(func(r *authv3.AttributeContext_HttpRequest) {
			r.HeaderMap.Headers = append(r.HeaderMap.Headers, &corev3.HeaderValue{Key: "x", RawValue: []byte("\xff")})
		}), policy.BadRequest, "UTF-8"},
		"no method":           {asked("", "/orders"), policy.BadRequest, "no method"},
		"a tunnel":            {asked("CONNECT", "/orders"), policy.BadRequest, "CONNECT"},
		"no path":             {asked("GET", ""), policy.BadRequest, "start with"},
		"all paths":           {asked("OPTIONS", "*"), policy.BadRequest, "start with"},
		"a whole URL":         {asked("GET", "http://orders/"), policy.BadRequest, "start with"},
		"dots":                {asked("GET", "/a/../b"), policy.BadRequest, `".."`},
		"encoded dots":        {asked("GET", "/a/%2e%2e/b"), policy.BadRequest, "needs no encoding"},
		"an encoded slash":    {asked("GET", "/a%2Fb"), policy.BadRequest, `'/'`},
		"two slashes":         {asked("GET", "//a"), policy.BadRequest, "empty segment"},
		"a backslash":         {asked("GET", `/a\b`), policy.BadRequest, `'\\'`},
		"a parameter":         {asked("GET", "/a;b"), policy.BadRequest, "';'"},
		"a fragment":          {asked("GET", "/a#b"), policy.BadRequest, "'#'"},
		"one in the query":    {asked("GET", "/a?b#c"), policy.BadRequest, "fragment"},
		"one beside the path": {http(func(r *authv3.AttributeContext_HttpRequest) { r.Fragment = "x" }), policy.BadRequest, "fragment"},
		"a query beside it":   {http(func(r *authv3.AttributeContext_HttpRequest) { r.Query = "x" }), policy.BadRequest, "query"},
		"a control character": {asked("GET", "/a?b\x01"), policy.BadRequest, "control"},
		"gRPC by GET":         {with(asked("GET", "/shop.Orders/List"), protocol("grpc")), policy.BadRequest, "POST"},
		"gRPC with a query":   {with(asked("POST", "/shop.Orders/List?x"), protocol("grpc")), policy.BadRequest, "'?'"},
		"gRPC, three parts":   {with(asked("POST", "/shop.Orders/List/x"), protocol("grpc")), policy.BadRequest, "Service/Method"},
		"gRPC, one part":      {with(asked("POST", "/shop.Orders"), protocol("grpc")), policy.BadRequest, "Service/Method"},
		"gRPC, no method":     {with(asked("POST", "/shop.Orders/"), protocol("grpc")), policy.BadRequest, "Service/Method"},
	} {
		t.Run(name, func(t *testing.T) {
			c := read(tt.a)
			switch {
			case c.fault == nil:
				if tt.want != "" {
					t.Errorf("nothing is wrong; want %s", tt.want)
				}
			case c.fault.reason != tt.want || !strings.Contains(c.fault.err.Error(), tt.says):
				t.Errorf("%s: %v; want %s with %q", c.fault.reason, c.fault.err, tt.want, tt.says)
			}
		})
	}
}

// Whatever the fields are, the policy sees none that claims an identity, and all that
// the server behind sees.
func TestHeadersReachThePolicy(t *testing.T) {
	names := rapid.SampledFrom([]string{"accept", "Accept", "x-spiffe-id", "X_Spiffe-Id", "x-forwarded-client-cert", ":path", ":x", "cookie"})
	rapid.Check(t, func(t *rapid.T) {
		var fields []string
		want := map[string][]string{}
		for range rapid.IntRange(0, 8).Draw(t, "fields") {
			name, value := names.Draw(t, "name"), rapid.String().Draw(t, "value")
			if name == ":path" {
				value = "/"
			}
			fields = append(fields, name, value)
			if lower := strings.ToLower(name); !policy.ClaimsIdentity(lower) && lower[0] != ':' {
				want[lower] = append(want[lower], value)
			}
		}
		c := read(asked("GET", "/", fields...))
		if diff := cmp.Diff(want, map[string][]string(c.in.HeaderMap())); diff != "" || c.fault != nil {
			t.Fatalf("fault %v (-want +got):\n%s", c.fault, diff)
		}
	})
}

// Bytes of anybody: what is not refused is a call that every enforcement point would
// put to a policy.
func FuzzRead(f *testing.F) {
	for _, a := range []*authv3.AttributeContext{
		asked("GET", "/orders?x=1", "accept", "a"), merged(asked("GET", "/orders")), with(asked("POST", "/shop.Orders/List"), protocol("grpc")), {},
	} {
		raw, err := proto.Marshal(&authv3.CheckRequest{Attributes: a})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var req authv3.CheckRequest
		if proto.Unmarshal(raw, &req) != nil {
			return
		}
		c := read(req.GetAttributes())
		var p peers
		peer, err := p.of(req.GetAttributes().GetSource())
		if (peer == nil) == (err == nil) || peer != nil && peer.ID.String() != req.GetAttributes().GetSource().GetPrincipal() {
			t.Errorf("peer %v, %v", peer, err)
		}
		if c.fault != nil {
			return
		}
		if err := policy.CheckPath(c.in.Path); err != nil {
			t.Error(err)
		}
		if c.in.Protocol == policy.GRPC {
			if _, _, ok := policy.SplitRPC(c.in.Path); !ok || c.in.Method != "POST" {
				t.Errorf("%s %s is taken for a gRPC call", c.in.Method, c.in.Path)
			}
		}
		for name := range c.in.HeaderMap() {
			if policy.ClaimsIdentity(name) || strings.HasPrefix(name, ":") || name != strings.ToLower(name) {
				t.Errorf("the policy sees header field %q", name)
			}
		}
	})
}
