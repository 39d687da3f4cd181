// server.conf becomes ca.yaml, and its federates_with commands.

package spire

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/federation"
)

// Follow is another trust domain whose trust bundle is fetched.
type Follow struct {
	TrustDomain string `json:"trust_domain"`
	URL         string `json:"url"`
	Profile     string `json:"profile"`
	EndpointID  string `json:"endpoint_spiffe_id,omitempty"`
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
	switch {
	case acme != nil || files != nil:
		fmt.Fprintf(&c.yaml, "bundle_endpoint:\n")
		c.put("  address", e.listens())
		c.put("  cert_file", files.take("cert_file_path"))
		c.put("  key_file", files.take("key_file_path"))
		if interval := files.at("file_sync_interval"); interval != nil {
			interval.taken = true
			c.note(interval.line, "server.federation.bundle_endpoint", "its files are read again when they change: file_sync_interval is left out")
		}
		if acme != nil {
			c.acme(acme)
		}
	case e.at("profile", "https_spiffe") != nil:
		c.endpointBySPIFFE(e)
	}
	if issuer := c.root.take("server", "jwt_issuer"); issuer != "" {
		if acme == nil && files == nil || !strings.HasPrefix(issuer, "https://") {
			c.missing(c.root.at("server", "jwt_issuer").line, "server.jwt_issuer", "%q: an issuer is the https:// URL of bundle_endpoint here, where OpenID Connect discovery is served", issuer)
			return
		}
		c.put("jwt_issuer", strings.TrimSuffix(issuer, "/"))
	}
}

// listens is where a bundle endpoint of SPIRE's is.
func (s *setting) listens() string {
	return net.JoinHostPort(s.take("address"), cmp.Or(s.take("port"), "443"))
}

// endpointBySPIFFE takes bundle_endpoint of https_spiffe, which is https_address here.
func (c *config) endpointBySPIFFE(e *setting) {
	profile := e.at("profile", "https_spiffe")
	profile.takeWhole()
	c.put("https_address", e.listens())
	c.note(profile.line, "server.federation.bundle_endpoint", "it is https_address here: whoever follows it has to know the path /v1/trust/bundle and the SPIFFE ID of the CA, whose path is /ca; agents find it by ca_https_address")
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
	pop := p.at("x509pop", "plugin_data", "ca_bundle_path")
	if many := p.at("x509pop", "plugin_data", "ca_bundle_paths"); pop == nil && many != nil && len(many.values) == 1 {
		pop = many
	}
	gcp, k8s := p.at("gcp_iit", "plugin_data", "projectid_allow_list"), p.at("k8s_psat", "plugin_data", "clusters")
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
	own := c.root.at("server", "trust_domain")
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
		profile.takeWhole()
		if is(own, td.key) {
			c.note(td.line, of, "it is its own trust domain, whose trust bundle every workload has: it is not followed")
			continue
		}
		if f.URL == "" || f.Profile == "" {
			c.missing(td.line, of, "it has no bundle_endpoint_url, or no bundle_endpoint_profile: nothing of it is inferred")
			continue
		}
		if err := f.check(); err != nil {
			c.missing(td.line, of, "it is not followed: %v", err)
			continue
		}
		if f.Profile == "https_spiffe" {
			c.note(td.line, of, "its server is verified by the trust bundle that is known: hand the first over (--bundle FILE)")
		}
		out = append(out, f)
	}
	return out
}

// check says why f is none that the CA, or a shell, would take.
func (f Follow) check() error {
	if _, err := entry.ParseTrustDomain("trust_domain", f.TrustDomain); err != nil {
		return err
	}
	if printable(f.URL+f.EndpointID) != f.URL+f.EndpointID {
		return errors.New("its URL or SPIFFE ID holds what none can")
	}
	src := federation.Source{URL: f.URL, Profile: federation.Profile(f.Profile)}
	if f.EndpointID != "" {
		var err error
		if src.EndpointID, err = spiffeid.FromString(f.EndpointID); err != nil {
			return fmt.Errorf("endpoint_spiffe_id: %v", err)
		}
	}
	return src.Check()
}
