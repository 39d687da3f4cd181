// agent.conf becomes agent.yaml.

package spire

import "cmp"

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
	if file := root.at("agent", "join_token_file"); file != nil {
		c.put("join_token_file", root.take("agent", "join_token_file"))
		c.note(file.line, "agent.join_token_file", "put a token of merlon token create into it: SPIRE's is none here")
	}
	c.nodeProof(root.at("plugins", "NodeAttestor"))
	plugins := root.at("plugins")
	limit := plugins.at("WorkloadAttestor", "unix", "plugin_data", "workload_size_limit")
	for _, own := range [][]string{{"KeyManager", "disk"}, {"WorkloadAttestor", "unix"}, {"WorkloadAttestor", "systemd"}} {
		plugins.at(own...).takeWhole() // they are always there
	}
	if limit != nil {
		limit.taken = is(limit, "0")
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
	kind := map[string]string{
		"join_token": "join_token", "x509pop": "x509pop", "k8s_psat": "k8s", "gcp_iit": "gcp", "aws_iid": "aws", "azure_msi": "azure",
	}
	first := ""
	for _, a := range p.below {
		if kind[a.key] == "" {
			continue
		}
		if first != "" {
			c.missing(a.line, "plugins.NodeAttestor."+a.key, "an agent has one node_attestor, and %s is it", first)
			a.takeWhole()
			continue
		}
		first = a.key
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
	}
}
