// Pairs of proxies between a caller and an app, each two processes with mutual TLS 1.3
// between them: ours, one made of httputil.ReverseProxy in an afternoon, and those that
// Debian has, which decide nothing.

package bench_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

// The protocols of a pair: what it understands of what it carries.
const (
	carriesHTTP = "http" // HTTP/1.1
	carriesGRPC = "grpc"
	carriesTCP  = "tcp" // nothing of it
)

// pair is two processes.
type pair struct {
	name  string
	entry string // where the caller connects
	inner string // where the first process connects to the second
	pids  []int  // of the outbound side and of the inbound one
}

// maker starts a pair before the app, or says why it cannot.
type maker func(s *site, protocol, app string) (p pair, missing string)

// makers are all pairs, in the order of the table. The sidecar is the first: what others
// cost is compared with it.
var makers = []maker{sidecarPair, reverseProxyPair, haproxyPair, nginxPair, ghostunnelPair}

// site is a trust domain and files for those that know none.
type site struct {
	b     *testing.B
	d     *stage.Domain
	files stage.EtcdFiles
	dir   string
}

func newSite(b *testing.B) *site {
	b.Helper()
	dir := stage.Dir(b)
	s := &site{b: b, d: stage.Dev(b), dir: dir, files: stage.Certify(b, dir, "127.0.0.1")}
	s.d.Entry("/me")
	for _, bin := range []string{"merlon-sidecar", stage.Build(b, "reverseproxy", "integration/reverseproxy", "")} {
		s.d.Merlon("entry", "create", "--spiffe-id", s.d.ID("/me"), "--selector", "unix:path:"+stage.Bin(b, bin))
	}
	grants := "grants:\n"
	for i, rule := range []string{"http: {methods: [GET, POST], paths: [/orders/*, /grpc.testing.TestService/*]}", "grpc: {services: [grpc.testing.TestService]}", "tcp: {}"} {
		grants += fmt.Sprintf("  - {id: me-%d, from: [%[2]s], to: [%[2]s], %s}\n", i, s.d.ID("/me"), rule)
	}
	if err := os.Mkdir(filepath.Join(dir, "policy"), 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "policy", "grants.yaml"), []byte(grants), 0o600); err != nil {
		b.Fatal(err)
	}
	s.d.Merlon("policy", "push", filepath.Join(dir, "policy"))
	return s
}

// pairs starts those that there are.
func (s *site) pairs(protocol, app string) (all []pair) {
	s.b.Helper()
	for _, start := range makers {
		p, missing := start(s, protocol, app)
		if missing != "" {
			s.b.Log(missing)
		} else if p.name != "" {
			all = append(all, p)
		}
	}
	return all
}

func (s *site) port() string { return fmt.Sprintf("127.0.0.1:%d", stage.FreePort(s.b)) }

// ours starts one of our binaries as a workload of the trust domain.
func (s *site) ours(bin string, args ...string) (pid int) {
	return stage.Start(s.b, bin, []string{"SPIFFE_ENDPOINT_SOCKET=" + s.d.WorkloadAPI}, args...).PID()
}

// theirs starts another program, with a configuration if there is one.
func (s *site) theirs(program, config string, args ...string) (pid int) {
	s.b.Helper()
	if config != "" {
		file := filepath.Join(s.dir, fmt.Sprintf("config-%d", stage.FreePort(s.b)))
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			s.b.Fatal(err)
		}
		args = append(args, file)
	}
	var log stage.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if s.b.Failed() {
			s.b.Logf("%s said:\n%s", program, log.String())
		}
	})
	return cmd.Process.Pid
}

func sidecarPair(s *site, protocol, app string) (pair, string) {
	in, out := s.port(), s.port()
	inbound := s.ours("merlon-sidecar", "-health-address", "off", "-inbound", in+","+app+","+protocol)
	return pair{"sidecar", out, in, []int{s.ours("merlon-sidecar", "-health-address", "off", "-outbound", out+",me,"+protocol+","+in), inbound}}, ""
}

func reverseProxyPair(s *site, protocol, app string) (pair, string) {
	if protocol == carriesTCP {
		return pair{}, ""
	}
	in, out := s.port(), s.port()
	inbound := s.ours("reverseproxy", "inbound", protocol, in, app)
	return pair{"reverseproxy", out, in, []int{s.ours("reverseproxy", "outbound", protocol, out, "me", in), inbound}}, ""
}

func haproxyPair(s *site, protocol, app string) (pair, string) {
	path, err := exec.LookPath("haproxy")
	if err != nil {
		return pair{}, "HAProxy is not measured: apt-get install haproxy"
	}
	both := filepath.Join(s.dir, "both.pem")
	cert, err1 := os.ReadFile(s.files.Cert)
	key, err2 := os.ReadFile(s.files.Key)
	if err1 != nil || err2 != nil || os.WriteFile(both, append(cert, key...), 0o600) != nil {
		s.b.Fatal(err1, err2)
	}
	mode, h2, tls := "http", "", " ssl crt "+both+" ca-file "+s.files.CA+" verify required"
	switch protocol {
	case carriesTCP:
		mode = "tcp"
	case carriesGRPC:
		h2 = " proto h2"
	}
	start := func(bind, server string) int {
		return s.theirs(path, fmt.Sprintf(`global
  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
  mode %s
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
listen l
  bind %s
  server s %s
`, mode, bind, server), "-db", "-f")
	}
	in, out := s.port(), s.port()
	alpn := ""
	if h2 != "" {
		alpn = " alpn h2"
	}
	inbound := start(in+tls+alpn+h2, app+h2)
	return pair{"haproxy", out, in, []int{start(out+h2, in+tls+alpn+h2), inbound}}, ""
}

// nginxStream is nginx's module for TCP, which Debian packs apart.
const nginxStream = "/usr/lib/nginx/modules/ngx_stream_module.so"

func nginxPair(s *site, protocol, app string) (pair, string) {
	path, err := exec.LookPath("nginx")
	if err != nil {
		return pair{}, "nginx is not measured: apt-get install nginx-light libnginx-mod-stream"
	}
	if _, err := os.Stat(nginxStream); err != nil && protocol == carriesTCP {
		return pair{}, "nginx is not measured over TCP: apt-get install libnginx-mod-stream"
	}
	start := func(name, text string) (pid int) {
		dir := filepath.Join(s.dir, protocol+name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			s.b.Fatal(err)
		}
		text = fmt.Sprintf("daemon off; master_process off; pid %s/pid; error_log %[1]s/err; worker_rlimit_nofile 8192; events { worker_connections 4096; }\n", dir) +
			strings.NewReplacer("DIR", dir, "CERT", s.files.Cert, "KEY", s.files.Key, "ROOT", s.files.CA).Replace(text)
		if protocol == carriesTCP {
			text = "load_module " + nginxStream + ";\n" + text
		}
		return s.theirs(path, text, "-e", filepath.Join(dir, "err"), "-c")
	}
	in, out := s.port(), s.port()
	texts := nginxConfig[protocol]
	fill := func(text string) string { return strings.NewReplacer("OUT", out, "IN", in, "APP", app).Replace(text) }
	inbound := start("-in", fill(texts.inbound))
	return pair{"nginx", out, in, []int{start("-out", fill(texts.outbound)), inbound}}, ""
}

const (
	nginxServes = ` ssl_certificate CERT; ssl_certificate_key KEY; ssl_client_certificate ROOT; ssl_verify_client on; ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_session_cache off; `
	nginxHTTP   = `http { access_log off; keepalive_requests 1000000; client_max_body_size 2m; client_body_buffer_size 2m;
client_body_temp_path DIR/1; proxy_temp_path DIR/2; fastcgi_temp_path DIR/3; uwsgi_temp_path DIR/4; scgi_temp_path DIR/5; `
	nginxProxies = ` proxy_ssl_certificate CERT; proxy_ssl_certificate_key KEY; proxy_ssl_trusted_certificate ROOT; proxy_ssl_verify on; proxy_ssl_name 127.0.0.1; proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse off; `
)

var nginxConfig = map[string]struct{ inbound, outbound string }{
	carriesHTTP: {
		nginxHTTP + `upstream app { server APP; keepalive 128; keepalive_requests 1000000; }
server { listen IN ssl;` + nginxServes + `location / { proxy_http_version 1.1; proxy_request_buffering off; proxy_set_header Connection ""; proxy_pass http://app; } } }`,
		nginxHTTP + `upstream in { server IN; keepalive 128; keepalive_requests 1000000; }
server { listen OUT; location / { proxy_http_version 1.1; proxy_request_buffering off; proxy_set_header Connection ""; proxy_pass https://in;` + nginxProxies + `} } }`,
	},
	carriesGRPC: {
		nginxHTTP + `upstream app { server APP; keepalive 128; keepalive_requests 1000000; }
server { listen IN ssl http2;` + nginxServes + `location / { grpc_pass grpc://app; } } }`,
		nginxHTTP + `upstream in { server IN; keepalive 128; keepalive_requests 1000000; }
server { listen OUT http2; location / { grpc_pass grpcs://in;` + strings.ReplaceAll(nginxProxies, "proxy_", "grpc_") + `} } }`,
	},
	carriesTCP: {
		`stream { server { listen IN ssl;` + nginxServes + `proxy_pass APP; } }`,
		`stream { server { listen OUT; proxy_ssl on;` + nginxProxies + `proxy_pass IN; } }`,
	},
}

func ghostunnelPair(s *site, protocol, app string) (pair, string) {
	path := os.Getenv("MERLON_BENCH_GHOSTUNNEL")
	if protocol != carriesTCP || path == "" {
		return pair{}, map[bool]string{true: "ghostunnel is not measured: set MERLON_BENCH_GHOSTUNNEL to its binary"}[protocol == carriesTCP]
	}
	in, out := s.port(), s.port()
	files := []string{"--cert", s.files.Cert, "--key", s.files.Key, "--cacert", s.files.CA, "--quiet", "all"}
	inbound := s.theirs(path, "", append([]string{"server", "--listen", in, "--target", app, "--allow-all"}, files...)...)
	return pair{"ghostunnel", out, in, []int{s.theirs(path, "", append([]string{"client", "--listen", out, "--target", in}, files...)...), inbound}}, ""
}
