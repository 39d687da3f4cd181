// agent.conf becomes agent.yaml.

package spire

import "cmp"

// noAgent is what agent.conf says that has no equivalent here.
var noAgent = nothing{
	{"agent.trust_bundle_path", "the agent knows the CA by root_hash: merlon token create, or merlon trust show, prints it"},
	{"agent.trust_bundle_url", "the agent knows the CA by root_hash: merlon token create, or merlon trust show, prints it"},
	{"agent.insecure_bootstrap", "the agent knows the CA by root_hash, and speaks to no other: merlon token create, or merlon trust show, prints it"},
	{"agent.join_token", "SPIRE's token is none here: merlon token create, and join_token_file"},
	{"agent.authorized_delegates", "there is no Delegated Identity API"},
	{"agent.workload_x509_svid_key_type", "the agent makes ECDSA P-256 keys; a workload may make its own (--key-delivery workload)"},
	{"agent.sds", "Envoy's secrets have SPIRE's default names: agent/README.md"},
	{"agent.log_file", "the log goes to standard error"},
	{"telemetry", "metrics are served at health_address, /metrics, and go by OTLP as OTEL_* say"},
	{"health_checks", "/live and /ready are at health_address"},
	{"plugins.KeyManager", "the agent's key is sealed in data_dir (key_file, key_credential or key_passphrase_file say under what)"},
	{"plugins.NodeAttestor", "no node proves itself by this here: agent/README.md"},
	{"plugins.WorkloadAttestor.k8s", "set kubelet_address, such as NODE:10250; its certificate must be for that host"},
	{"plugins.WorkloadAttestor.docker", "nobody asks Docker here: container:id and container:runtime come from the control group"},
	{"plugins.WorkloadAttestor", "nothing here proves this of a process: agent/README.md, Selectors"},
	{"plugins.SVIDStore", "SVIDs are not put into secret stores of clouds"},
}

// Agent translates agent.conf: the text of agent.yaml, which lacks root_hash, as no
// root of SPIRE's is Merlon's.
func Agent(file string, data []byte) (yaml string, list []Remark, err error) {
	root, err := readConfig(file, data)
	if err != nil {
		return "", nil, err
	}
	c := &config{remarks: remarks{file: file}, root: root}
	c.plugins()
	c.put("trust_domain", root.take("agent", "trust_domain"))
	if root.at("agent", "server_address") == nil {
		c.missing(0, "agent.server_address", "it is missing: add ca_address")
	} else {
		c.put("ca_address", c.address("agent", "server_address", "server_port", "", "8081"))
	}
	c.dataDir("agent")
	c.put("public_socket", root.take("agent", "socket_path"))
	c.put("admin_socket", root.take("agent", "admin_socket_path"))
	c.log("agent")
	c.health()
	if key := root.at("agent", "workload_x509_svid_key_type"); is(key, "ec-p256") {
		key.taken = true
	}
	c.nodeProof(root.at("plugins", "NodeAttestor"))
	for _, own := range [][]string{{"KeyManager", "disk"}, {"WorkloadAttestor", "unix"}, {"WorkloadAttestor", "systemd"}} {
		if s := root.at("plugins").at(own...); s != nil {
			s.takeWhole() // they are always there
		}
	}
	c.note(0, "root_hash", "add it, as merlon token create or merlon trust show prints it")
	c.finish(noAgent)
	return c.yaml.String(), c.list, nil
}

// nodeProof takes how the node proves itself.
func (c *config) nodeProof(p *setting) {
	if p == nil {
		return
	}
	if len(p.below) > 1 {
		c.missing(p.line, "plugins.NodeAttestor", "there are several; an agent has one node_attestor")
	}
	kind := map[string]string{
		"join_token": "join_token", "x509pop": "x509pop", "k8s_psat": "k8s", "gcp_iit": "gcp", "aws_iid": "aws", "azure_msi": "azure",
	}
	for _, a := range p.below {
		if kind[a.key] == "" {
			continue
		}
		a.taken = true
		if data := a.at("plugin_data"); data != nil {
			data.taken = true
		}
		c.put("node_attestor", kind[a.key])
		switch a.key {
		case "x509pop":
			c.put("node_cert_file", a.take("plugin_data", "certificate_path"))
			c.put("node_key_file", a.take("plugin_data", "private_key_path"))
		case "k8s_psat":
			c.put("k8s_cluster", a.take("plugin_data", "cluster"))
			c.put("k8s_token_file", cmp.Or(a.take("plugin_data", "token_path"), "/var/run/secrets/tokens/spire-agent"))
		case "gcp_iit":
			c.put("node_audience", gcpAudience)
		case "azure_msi":
			c.put("node_audience", a.take("plugin_data", "resource_id"))
		}
		return
	}
}
