// server.conf becomes ca.yaml, and its federates_with commands.

package spire

import (
	"fmt"
	"net"
	"strings"

	"merlon.dev/ca/internal/entry"
)

// Follow is another trust domain whose trust bundle is fetched.
type Follow struct {
	TrustDomain string `json:"trust_domain"`
	URL         string `json:"url"`
	Profile     string `json:"profile"`
	EndpointID  string `json:"endpoint_spiffe_id,omitempty"`
}

// noServer is what server.conf says that has no equivalent here.
var noServer = nothing{
	{"server.ca_subject", "authorities have subjects of their own, one for each generation"},
	{"server.ca_key_type", "X.509 authorities sign with ECDSA P-256"},
	{"server.jwt_key_type", "JWT keys are ES256 or RS256 (jwt_algorithm)"},
	{"server.admin_ids", "give the entry of the workload a role (merlon entry create --role operator), or a token (oidc)"},
	{"server.socket_path", "administrators use admin_socket, /run/merlon/ca/admin.sock"},
	{"server.registration_uds_path", "administrators use admin_socket, /run/merlon/ca/admin.sock"},
	{"server.audit_log_enabled", "the audit log is always written"},
	{"server.ratelimit", "limits are agent_issue_rate, for each agent"},
	{"server.log_file", "the log goes to standard error"},
	{"server.federation.bundle_endpoint.profile.https_spiffe", "https_address serves the trust bundle by https_spiffe, at /v1/trust/bundle"},
	{"telemetry", "metrics are served at health_address, /metrics, and go by OTLP as OTEL_* say"},
	{"health_checks", "/live and /ready are at health_address"},
	{"plugins.DataStore", "registrations are in Badger, in data_dir, or for several replicas in etcd (store: etcd)"},
	{"plugins.KeyManager", "keys are sealed files, or in a token or KMS: ca/README.md, Keys"},
	{"plugins.NodeAttestor.aws_iid", "name accounts and the certificates of their regions: node_attestors.aws"},
	{"plugins.NodeAttestor.azure_msi", "name one tenant, an audience of your own and its subscriptions: node_attestors.azure"},
	{"plugins.NodeAttestor.x509pop.plugin_data.agent_path_template", "nodes are named by node_attestors.x509pop.name: public_key, common_name or dns_name"},
	{"plugins.NodeAttestor.x509pop", "this of it is nothing here: ca/README.md, Nodes"},
	{"plugins.NodeAttestor.gcp_iit", "this of it is nothing here: ca/README.md, Nodes"},
	{"plugins.NodeAttestor.k8s_psat", "this of it is nothing here: ca/README.md, Nodes"},
	{"plugins.NodeAttestor", "nothing here takes this as proof of a node: ca/README.md, Nodes"},
	{"plugins.UpstreamAuthority.spire", "below another CA of Merlon a CA is nested: upstream: merlon, and merlon token create --kind nested-ca"},
	{"plugins.UpstreamAuthority", "ca/README.md, Upstream authorities, lists who may sign: disk, stepcas, vaultcas, cloudcas"},
	{"plugins.Notifier", "nothing is pushed; the trust bundle is served at https_address and bundle_endpoint"},
	{"plugins.BundlePublisher", "nothing is pushed; the trust bundle is served at https_address and bundle_endpoint"},
	{"plugins.CredentialComposer", "what SVIDs look like is fixed"},
}

// Server translates server.conf: the text of ca.yaml, and whom to follow.
func Server(file string, data []byte) (yaml string, follow []Follow, list []Remark, err error) {
	root, err := readConfig(file, data)
	if err != nil {
		return "", nil, nil, err
	}
	c := &config{remarks: remarks{file: file}, root: root}
	c.plugins()
	c.put("trust_domain", root.take("server", "trust_domain"))
	c.dataDir("server")
	c.put("address", c.address("server", "bind_address", "bind_port", "0.0.0.0", "8081"))
	c.ttl("intermediate_ttl", 0, "server", "ca_ttl")
	c.ttl("x509_svid_ttl", entry.MaxX509SVIDTTL, "server", "default_x509_svid_ttl")
	c.ttl("jwt_svid_ttl", entry.MaxJWTSVIDTTL, "server", "default_jwt_svid_ttl")
	c.ttl("agent_svid_ttl", entry.MaxX509SVIDTTL, "server", "agent_ttl")
	c.ttl("trust_refresh_hint", 0, "server", "federation", "bundle_endpoint", "refresh_hint")
	c.keyTypes()
	c.log("server")
	c.health()
	c.endpoint()
	c.serverPlugins()
	follow = c.follow()
	c.finish(noServer)
	return c.yaml.String(), follow, c.list, nil
}

// dataDir keeps what is ours out of SPIRE's folder.
func (c *config) dataDir(section string) {
	if dir := c.root.take(section, "data_dir"); dir != "" {
		c.note(c.root.at(section, "data_dir").line, section+".data_dir", "data_dir keeps its default: take a folder of its own, not SPIRE's %s", dir)
	}
}

// keyTypes takes those that are ours.
func (c *config) keyTypes() {
	ca, jwt := c.root.at("server", "ca_key_type"), c.root.at("server", "jwt_key_type")
	if is(ca, "ec-p256") {
		ca.taken = true
	}
	if jwt == nil {
		jwt = ca
	}
	switch {
	case is(jwt, "ec-p256"):
		jwt.taken = true
		c.put("jwt_algorithm", "ES256")
	case is(jwt, "rsa-2048"):
		c.put("jwt_algorithm", "RS256")
		jwt.taken = jwt != ca // of X.509 authorities it is not taken
	}
}

func is(s *setting, value string) bool {
	return s != nil && len(s.values) == 1 && s.values[0] == value
}

// endpoint takes bundle_endpoint of https_web, and jwt_issuer, which needs it.
func (c *config) endpoint() {
	e := c.root.at("server", "federation", "bundle_endpoint")
	web := e.at("profile", "https_web")
	if web == nil {
		web = e // as it was written before SPIRE 1.0
	}
	acme, files := web.at("acme"), web.at("serving_cert_file")
	if acme != nil || files != nil {
		host, port := e.take("address"), e.take("port")
		if port == "" {
			port = "443"
		}
		fmt.Fprintf(&c.yaml, "bundle_endpoint:\n")
		c.put("  address", net.JoinHostPort(host, port))
		c.put("  cert_file", files.take("cert_file_path"))
		c.put("  key_file", files.take("key_file_path"))
		if acme != nil {
			c.acme(acme)
		}
	}
	if issuer := c.root.take("server", "jwt_issuer"); issuer != "" {
		if acme == nil && files == nil || !strings.HasPrefix(issuer, "https://") {
			c.missing(c.root.at("server", "jwt_issuer").line, "server.jwt_issuer", "%q: an issuer is the https:// URL of bundle_endpoint here, where OpenID Connect discovery is served", issuer)
			return
		}
		c.put("jwt_issuer", strings.TrimSuffix(issuer, "/"))
	}
}

func (c *config) acme(acme *setting) {
	directory := acme.take("directory_url")
	if directory == "" {
		directory = "https://acme-v02.api.letsencrypt.org/directory"
	}
	fmt.Fprintf(&c.yaml, "  acme:\n")
	c.put("    directory", directory)
	c.putList("    domains", acme.takeAll("domain_name"))
	c.put("    email", acme.take("email"))
	if acme.take("tos_accepted") == "true" {
		fmt.Fprintf(&c.yaml, "    accept_terms: true\n")
	}
}

// serverPlugins takes those that are here, too.
func (c *config) serverPlugins() {
	p := c.root.at("plugins")
	for _, own := range [][]string{{"NodeAttestor", "join_token"}, {"KeyManager", "disk"}, {"NodeResolver", "noop"}} {
		if s := p.at(own...); s != nil {
			s.takeWhole() // join tokens are always taken, and keys are always on disk
		}
	}
	if sql := p.at("DataStore", "sql"); is(sql.at("plugin_data", "database_type"), "sqlite3") {
		sql.takeWhole() // one replica: Badger
	}
	if disk := p.at("UpstreamAuthority", "disk", "plugin_data"); disk != nil {
		cert, root := disk.take("cert_file_path"), disk.take("bundle_file_path")
		if root == "" {
			root = cert
		}
		c.put("upstream", "disk")
		c.put("upstream_root_file", root)
		c.put("upstream_cert_file", cert)
		c.put("upstream_key_file", disk.take("key_file_path"))
	}
	c.nodeAttestors(p.at("NodeAttestor"))
}

func (c *config) nodeAttestors(p *setting) {
	pop, gcp, k8s := p.at("x509pop", "plugin_data", "ca_bundle_path"), p.at("gcp_iit", "plugin_data", "projectid_allow_list"), p.at("k8s_psat", "plugin_data", "clusters")
	if pop == nil && gcp == nil && k8s == nil {
		return
	}
	fmt.Fprintf(&c.yaml, "node_attestors:\n")
	if pop != nil {
		pop.taken = true
		fmt.Fprintf(&c.yaml, "  x509pop: {ca_file: %s}\n", quoted(strings.Join(pop.values, "")))
	}
	if gcp != nil {
		gcp.taken = true
		fmt.Fprintf(&c.yaml, "  gcp:\n    audience: %s\n", gcpAudience)
		c.putList("    projects", gcp.values)
	}
	if k8s != nil {
		fmt.Fprintf(&c.yaml, "  k8s:\n")
		for _, cluster := range k8s.below {
			audience := cluster.take("audience")
			if audience == "" {
				audience = "spire-server"
			}
			fmt.Fprintf(&c.yaml, "    - cluster: %s\n", quoted(cluster.key))
			c.put("      audience", audience)
			c.putList("      service_accounts", cluster.takeAll("service_account_allow_list"))
			c.missing(cluster.line, "plugins.NodeAttestor.k8s_psat.plugin_data.clusters."+cluster.key, "say who verifies its tokens: add issuer (the keys of the cluster), or api_server with token_file")
		}
	}
}

// gcpAudience is what SPIRE's agents ask Google's tokens for.
const gcpAudience = "spire-gcp-node-attestor"

// follow takes federates_with.
func (c *config) follow() []Follow {
	var out []Follow
	all := c.root.at("server", "federation", "federates_with")
	if all == nil {
		return nil
	}
	for _, td := range all.below {
		f := Follow{TrustDomain: td.key, URL: td.take("bundle_endpoint_url")}
		profile := td.at("bundle_endpoint_profile")
		switch {
		case profile.at("https_spiffe") != nil:
			f.Profile, f.EndpointID = "https_spiffe", profile.take("https_spiffe", "endpoint_spiffe_id")
		case profile.at("https_web") != nil:
			f.Profile = "https_web"
		}
		of := "server.federation.federates_with." + td.key
		if f.URL == "" || f.Profile == "" {
			c.missing(td.line, of, "it has no bundle_endpoint_url, or no bundle_endpoint_profile: nothing of it is inferred")
			continue
		}
		// They become words of a command.
		if _, err := entry.ParseTrustDomain("trust_domain", f.TrustDomain); err != nil || printable(f.URL+f.EndpointID) != f.URL+f.EndpointID {
			c.missing(td.line, of, "its name, URL or SPIFFE ID holds what none can")
			continue
		}
		profile.takeWhole()
		if f.Profile == "https_spiffe" {
			c.note(td.line, of, "its server is verified by the trust bundle that is known: hand the first over (--bundle FILE)")
		}
		out = append(out, f)
	}
	return out
}
